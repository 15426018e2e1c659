"""Settings that name code: a scorer in a Python file, PATH.py:NAME.

A configuration file alone never makes it run.

Recipes are passed around, and whoever starts one expects settings. So the person who starts the
program names the file, on the command line; a configuration file may repeat the name, as the
config.yaml of every run does.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def names_code(text: str) -> bool:
    """Whether a setting names something in a Python file."""
    path, colon, inside = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and inside.isidentifier()


def code_of_the_file_alone(values: Mapping, path: str, given: Mapping[str, str]) -> list[str]:
    """One sentence for each setting of a configuration file that names code which the command line
    does not name.

    values: what the file says, nested; given: the options of the command line by their dotted
    names.
    """
    selection = values.get("selection")
    return [
        f"selection.{setting}: {path} names {name}, and a configuration file runs no code; if you "
        f"trust that Python file, name it on the command line too, in --selection.{setting}"
        for setting, value in (selection.items() if isinstance(selection, Mapping) else ())
        for name in _named(value)
        if not any(name in text for text in given.values())
    ]


def _named(value: Any) -> Iterator[str]:
    """Every PATH.py:NAME in a value: also the children of combinators, which are items or keys of
    their options.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named(key)
            yield from _named(inner)
    elif isinstance(value, list):
        for each in value:
            yield from _named(each)
    elif isinstance(value, str) and names_code(value):
        yield value
