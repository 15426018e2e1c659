"""Parts of a run that outside code can provide: which settings name them, and how they are found.

A setting names a part that is built in, one that an installed package offers under an entry point,
or a function in a Python file, PATH.py:NAME. Looking at the names runs no code. Files are run by
`load_part`, which `train` alone calls (training/outside_parts.py), after config/code.py has seen
that the command line names the file too. Scorers have a registry of their own
(selection/scorers.py), because they bring options and needs.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from megatron_slm.config.code import names_code
from megatron_slm.config.nearest import did_you_mean
from megatron_slm.config.schema import Config

_MODULE_PREFIX = "slm_parts_"


@dataclass(frozen=True)
class ExtensionPoint:
    """A kind of part that outside code can provide."""

    setting: str
    """Dotted name of the setting that names it."""
    group: str
    """Entry point group in which installed packages offer such parts."""
    parameters: tuple[str, ...]
    """What the function is called with."""
    built_in: tuple[str, ...] = ()
    """Names that the library has itself."""


EXTENSION_POINTS = (
    ExtensionPoint(
        "optimizer.kind", "megatron_slm.optimizers", ("parameter_groups", "settings"), ("adamw",)
    ),
    ExtensionPoint(
        "schedule.style",
        "megatron_slm.schedules",
        ("position", "warmup_steps", "end"),
        ("constant", "linear", "cosine", "wsd"),
    ),
    ExtensionPoint("monitoring.sinks", "megatron_slm.sinks", ("run_folder", "settings")),
    ExtensionPoint("monitoring.validations", "megatron_slm.validations", ("validation",)),
    ExtensionPoint("monitoring.after_step", "megatron_slm.after_step", ("step", "metrics")),
)


def named_parts(config: Config) -> Iterator[tuple[ExtensionPoint, str]]:
    """Every part that the configuration takes from outside the library."""
    for point in EXTENSION_POINTS:
        section, field = point.setting.split(".")
        value = getattr(getattr(config, section), field)
        for name in value if isinstance(value, list) else [value]:
            if name and name not in point.built_in:
                yield point, name


def unknown_parts(config: Config) -> Iterator[str]:
    """One sentence for each name that is not built in, not a package's, and in no file."""
    for point, name in named_parts(config):
        if names_code(name):
            continue
        known = sorted({*point.built_in, *(each.name for each in entry_points(group=point.group))})
        if name not in known:
            yield (
                f"{point.setting}: got {name!r}; expected one of: "
                f"{', '.join([*known, 'PATH.py:NAME'])}. {did_you_mean(name, known)}".rstrip(" .")
            )


def load_part(point: ExtensionPoint, name: str) -> Callable[..., Any]:
    """The function that `name` stands for; runs its file. ValueError with the reason if it cannot
    be loaded.
    """
    try:
        part = _from_file(name) if names_code(name) else _from_entry_point(point, name)
    except _CannotLoad as error:
        raise ValueError(f"{point.setting}: {name}: {error}") from error
    wanted = f"{name.rpartition(':')[2]}({', '.join(point.parameters)})"
    if not callable(part):
        raise ValueError(f"{point.setting}: {name} is no function; expected {wanted}")
    try:
        inspect.signature(part).bind(*point.parameters)
    except TypeError as error:
        raise ValueError(
            f"{point.setting}: {name} cannot be called as {wanted} ({error})"
        ) from None
    except ValueError:  # a builtin may have no signature
        pass
    return part


def loaded_part_files() -> list[str]:
    """`PATH sha256:...` of every file that was run in this process, as it was when it was run."""
    modules = [part for name, part in sys.modules.items() if name.startswith(_MODULE_PREFIX)]
    return [f"{module.__file__} sha256:{vars(module)['source_sha256']}" for module in modules]


class _CannotLoad(ValueError):
    """Why a part cannot be loaded; the caller adds its name."""


def _from_entry_point(point: ExtensionPoint, name: str) -> Any:
    for entry in entry_points(group=point.group):
        if entry.name == name:
            try:
                return entry.load()
            except Exception as error:  # the package's code: it may raise anything
                raise _CannotLoad(
                    f"entry point {entry.value} of an installed package cannot be loaded: {error!r}"
                ) from error
    raise _CannotLoad(f"no installed package offers it under the entry points {point.group}")


def _from_file(name: str) -> Any:
    file_name, _, function = name.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise _CannotLoad(f"there is no file {path} (looked from {Path.cwd()})")
    source = path.read_bytes()
    module_name = _MODULE_PREFIX + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    module = sys.modules.get(module_name)
    if module is None:
        module = _run_file(path, module_name, hashlib.sha256(source).hexdigest())
    if not hasattr(module, function):
        found = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise _CannotLoad(
            f"{path} defines no {function!r}. {did_you_mean(function, found)}".rstrip(" .")
        )
    return getattr(module, function)


def _run_file(path: Path, module_name: str, source_sha256: str) -> Any:
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None  # the file's name ends in .py
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    vars(module)["source_sha256"] = source_sha256
    sys.modules[module_name] = module  # dataclasses in the user's file look themselves up here
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # the user's code: it may raise anything
        del sys.modules[module_name]
        raise _CannotLoad(f"running {path} failed: {type(error).__name__}: {error}") from error
    return module
