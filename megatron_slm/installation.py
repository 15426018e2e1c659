"""How this copy of the project is installed: from a checkout or a wheel, and with which extras.

A wheel has the library as its only top-level package. The programs of tokenizer/ and data_tools/
and the scripts of launch/ lie inside it then, in megatron_slm/_checkout/ (setup.py), and the
console commands below start the programs from there, in a checkout from beside the library.
"""

import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

EXTRAS = {
    "torch": "train",
    "megatron": "train",
    "psutil": "train",
    "triton": "gpu",
    "transformers": "hf",
    "safetensors": "hf",
    "wandb": "wandb",
    "matplotlib": "report",
}
"""Top-level module -> the extra of pyproject.toml that brings it."""
WRONG_USAGE = 2

P = ParamSpec("P")


def missing_extra(module: str) -> str:
    """A sentence that names the extra which brings a module that is not installed; "" when none
    does.
    """
    name = module.partition(".")[0]
    if name not in EXTRAS:
        return ""
    return f"{name} is not installed; pip install 'megatron-slm[{EXTRAS[name]}]' brings it"


def require(*modules: str) -> None:
    """Raise ModuleNotFoundError, with `missing_extra` as its message, for the first of these
    top-level modules that is not installed.

    Loads none of them, so it can stand before everything that takes time.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(missing_extra(module), name=module)


def says_missing_extra(program: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorator of a program's `main`: an extra that is not installed is one sentence on standard
    error, said by the job's first process, and exit code 2; any other error is left alone.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*arguments: P.args, **named: P.kwargs) -> int:
            try:
                return main(*arguments, **named)
            except ModuleNotFoundError as error:
                sentence = missing_extra(error.name or "")
                if not sentence:
                    raise
            if os.environ.get("RANK", "0") == "0":
                print(f"{program}: {sentence}", file=sys.stderr)
            return WRONG_USAGE

        return run

    return decorate


def command_of(module: str) -> str:
    """The console command of a program: data_tools.merge is slm-merge, tokenizer.train
    slm-tokenizer-train.
    """
    package, name = module.split(".")
    words = [package, name] if package == "tokenizer" else [name]
    return "-".join(["slm", *words]).replace("_", "-")


def in_commands(text: str) -> str:
    """A text with console commands for `python -m PROGRAM`."""
    named = r"python -m ((?:megatron_slm|data_tools|tokenizer)\.\w+)"
    return re.sub(named, lambda found: command_of(found[1]), text)


def checkout() -> Path:
    """The folder with tokenizer/, data_tools/ and launch/: the checkout, or what a wheel carries
    of one.
    """
    package = Path(__file__).absolute().parent
    carried = package / "_checkout"
    return carried if carried.is_dir() else package.parent


def print_checkout() -> int:
    """slm-root: the folder that SLM_ROOT means in the scripts of launch/."""
    print(checkout())
    return 0


def tokenizer_train() -> int:
    """slm-tokenizer-train."""
    return _run("tokenizer.train")


def tokenizer_evaluate() -> int:
    """slm-tokenizer-evaluate."""
    return _run("tokenizer.evaluate")


def to_text() -> int:
    """slm-to-text."""
    return _run("data_tools.to_text")


def preprocess() -> int:
    """slm-preprocess."""
    return _run("data_tools.preprocess")


def merge() -> int:
    """slm-merge."""
    return _run("data_tools.merge")


def split() -> int:
    """slm-split."""
    return _run("data_tools.split")


def verify() -> int:
    """slm-verify."""
    return _run("data_tools.verify")


def inspect_corpus() -> int:
    """slm-inspect-corpus."""
    return _run("data_tools.inspect_corpus")


def _run(module: str) -> int:
    """Run a program that stands beside the library, with the command line of this process.

    Its folder comes first on sys.path in this process and, as multiprocessing hands sys.path on, in
    its workers; no other process on the machine sees it.
    """
    sys.path.insert(0, str(checkout()))
    return importlib.import_module(module).main()
