"""The programs that the preprocessing benchmark compares, and what running one costs."""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Importing Megatron-LM's trainer needs Triton for a kernel that preprocessing never calls; where
# there is no Triton, a stand-in takes the kernel's place.
_MEGATRON_LAUNCHER = """
import importlib.util, runpy, sys, types
if importlib.util.find_spec("triton") is None:
    name = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__getattr__ = lambda attribute: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_DATATROVE_LAUNCHER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
if __name__ == "__main__":
    corpus, tokenizer, folder, workers, eos = sys.argv[1:]
    tokenize = MegatronDocumentTokenizer(
        output_folder=folder, tokenizer_name_or_path=tokenizer, eos_token=eos
    )
    # fork, so that the CPU time of its workers is counted: nobody waits for a fork server
    LocalPipelineExecutor(
        [JsonlReader(corpus), tokenize],
        tasks=int(workers),
        workers=int(workers),
        logging_dir=folder + "/logs",
        start_method="fork",
    ).run()
"""


@dataclass
class Cost:
    wall_seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    """Of the largest single process."""


@dataclass
class Program:
    """A command, and what its environment has beside this process's own."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self) -> Cost:
        """Run to the end; CPU seconds of the process and all its descendants it waited for."""
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        began = time.monotonic()
        with tempfile.TemporaryFile() as log:
            process = os.posix_spawn(
                self.command[0],
                self.command,
                {**os.environ, **threads, **self.environment},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
            )
            _, status, usage = os.wait4(process, 0)
            if status:
                log.seek(0)
                tail = log.read().decode(errors="replace")[-3000:]
                raise SystemExit(f"{' '.join(self.command)[:300]} failed:\n{tail}")
        cpu_seconds = usage.ru_utime + usage.ru_stime
        return Cost(time.monotonic() - began, cpu_seconds, usage.ru_maxrss / 1024)


def programs(arguments: argparse.Namespace, corpus: str, folder: Path) -> dict[str, Program]:
    """The programs to compare, by name; those whose checkout or interpreter is given."""
    chosen = {
        "ours": _ours(arguments, corpus, folder / "ours"),
        "ours, plain encoder": _ours(arguments, corpus, folder / "plain", "--encoder", "plain"),
    }
    if arguments.megatron_lm:
        chosen["Megatron-LM"] = _megatron_lm(arguments, corpus, folder / "megatron")
    if arguments.datatrove_python:
        chosen["datatrove"] = _datatrove(arguments, corpus, folder)
    return chosen


def _ours(arguments: argparse.Namespace, corpus: str, prefix: Path, *options: str) -> Program:
    command = [sys.executable, "-m", "data_tools.preprocess"]
    command += ["--input", corpus]
    command += ["--tokenizer", arguments.tokenizer]
    command += ["--workers", str(arguments.workers)]
    command += ["--overwrite", *options]
    command += ["--output-prefix", str(prefix)]
    return Program(command, {"PYTHONPATH": str(ROOT)})


def _megatron_lm(arguments: argparse.Namespace, corpus: str, prefix: Path) -> Program:
    command = [sys.executable, "-c", _MEGATRON_LAUNCHER]
    command += [f"{arguments.megatron_lm}/tools/preprocess_data.py"]
    command += ["--input", corpus]
    command += ["--output-prefix", str(prefix)]
    command += ["--tokenizer-type", "SentencePieceTokenizer"]
    command += ["--tokenizer-model", arguments.tokenizer]
    command += ["--append-eod"]
    command += ["--workers", str(arguments.workers)]
    path = os.pathsep.join(filter(None, (arguments.megatron_lm, arguments.megatron_path)))
    return Program(command, {"PYTHONPATH": path})


def _datatrove(arguments: argparse.Namespace, corpus: str, folder: Path) -> Program:
    if not arguments.tokenizer_json:
        raise SystemExit(
            "--datatrove-python needs --tokenizer-json: "
            "datatrove reads Hugging Face vocabularies only"
        )
    command = [arguments.datatrove_python, "-c", _DATATROVE_LAUNCHER]
    command += [parts_of(corpus, arguments.workers, folder)]
    command += [arguments.tokenizer_json, str(folder / "datatrove")]
    command += [str(arguments.workers), arguments.eos]
    return Program(command)


def parts_of(corpus: str, workers: int, folder: Path) -> str:
    """A folder with the corpus in one file per worker: datatrove's unit of work is a file."""
    parts = folder / f"parts-{Path(corpus).name}"
    if not parts.exists():
        parts.mkdir(parents=True)
        with contextlib.ExitStack() as opened:
            lines = opened.enter_context(open(corpus, "rb"))
            names = [parts / f"{number}.jsonl" for number in range(workers)]
            streams = [opened.enter_context(open(name, "wb")) for name in names]
            for number, line in enumerate(lines):
                streams[number % workers].write(line)
    return str(parts)
