"""A scorer in a file of the user's own: `selection.scorer: PATH.py:NAME`.

Loading such a file runs its code. Only `load_scorer_files` does that, and only programs that start
from a configuration given by the user (train, plan) call it. Building a scorer never loads a file,
so a configuration read from a run folder or a checkpoint (by report, score, export) runs nothing.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_slm.selection import scorers
from megatron_slm.selection.naming import meant

_MODULE_PREFIX = "slm_scorers_"


def load_scorer_files(name: str, options: Mapping[str, object] | None = None) -> None:
    """Register the scorers that a configuration takes from files: `name`, and its children.

    A registered name is taken as it is. Raises ValueError for a file that is missing, fails, or
    registers no scorer of that name.
    """
    for setting in _named(name, options or {}):
        if setting not in scorers.SCORERS and scorers.in_file(setting):
            _load(setting)


def loaded_scorer_files() -> list[str]:
    """`PATH sha256:...` of every file that was run in this process, as it was when it was run."""
    modules = [part for name, part in sys.modules.items() if name.startswith(_MODULE_PREFIX)]
    return [f"{module.__file__} sha256:{module.source_sha256}" for module in modules]


def _named(name: object, options: Mapping) -> Iterator[str]:
    """The names of a scorer and of those it is made of, as child_scorer reads them."""
    if isinstance(name, str):
        yield name
    of = options.get("of", ())
    for child in [of] if isinstance(of, str | Mapping) else of:
        if isinstance(child, str):
            yield child
        elif isinstance(child, Mapping) and "name" in child:
            yield from _named(child["name"], child)
        elif isinstance(child, Mapping):
            # weighted_sum: {name: weight}
            yield from (key for key in child if isinstance(key, str))


def _load(setting: str) -> None:
    file_name, _, name = setting.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise ValueError(f"scorer {setting}: there is no file {path} (looked from {Path.cwd()})")
    module_name = _MODULE_PREFIX + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None  # a path that ends with .py always has a loader
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    vars(module)["source_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    sys.modules[module_name] = module  # dataclasses in the user's file look up their module here
    try:
        with scorers.registered_as(f"{file_name}:") as found:
            specification.loader.exec_module(module)
    except Exception as error:
        # The user's code may raise anything; the message must name the file to change.
        del sys.modules[module_name]
        raise ValueError(
            f"scorer {setting}: running {path} failed: {type(error).__name__}: {error}"
        ) from error
    if name not in found:
        registers = f"registers {', '.join(found)}" if found else "registers no scorer"
        raise ValueError(
            f"scorer {setting}: {path} {registers}{meant(name, found)}; "
            f"write @register_scorer({name!r}, needs=...) above the function (docs/selection.md)"
        )
