"""Settings that name code: a scorer, or another part, in a Python file: PATH.py:NAME.

A configuration file alone never makes it run. Recipes are passed around, and whoever starts one
expects settings. So the person who starts the program names the file, on the command line; a
configuration file may repeat the name, as the config.yaml of every run does.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_slm.config.schema import Config

SETTINGS = (
    "optimizer.kind",
    "schedule.style",
    "monitoring.sinks",
    "monitoring.validations",
    "monitoring.after_step",
)
"""Settings that may name a function in a Python file, beside those of `selection`."""


def names_code(text: str) -> bool:
    """Whether a setting names something in a Python file."""
    path, colon, inside = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and inside.isidentifier()


def parts_in_files(config: "Config") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each setting of SETTINGS that names something in a Python file."""
    for setting in SETTINGS:
        section, field = setting.split(".")
        value = getattr(getattr(config, section), field)
        if any(_names_of_code(value)):
            yield setting, value


def code_of_the_file_alone(values: Mapping, path: str, given: Mapping[str, str]) -> list[str]:
    """One sentence for each setting of the file that names code which the command line does not.

    values: the settings of the file, nested; given: the options of the command line by their dotted
    names.
    """
    problems = []
    for setting, value in _settings_that_may_name_code(values):
        for name in _names_of_code(value):
            if not any(name in text for text in given.values()):
                problems.append(
                    f"{setting}: {path} names {name}, and a configuration file runs no code; if "
                    "you trust that Python file, name it on the command line too, in "
                    f"--{setting}"
                )
    return problems


def _settings_that_may_name_code(values: Mapping) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each such setting in the file; in `selection`, of every one."""
    for section_name, section in values.items():
        for field, value in section.items() if isinstance(section, Mapping) else ():
            if section_name == "selection" or f"{section_name}.{field}" in SETTINGS:
                yield f"{section_name}.{field}", value


def _names_of_code(value: Any) -> Iterator[str]:
    """Every PATH.py:NAME in a value.

    Scorers that combine others name them as items or keys of their options.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _names_of_code(key)
            yield from _names_of_code(inner)
    elif isinstance(value, list):
        for each in value:
            yield from _names_of_code(each)
    elif isinstance(value, str) and names_code(value):
        yield value
