"""Which entries of a description run code: the command for the text, and Python files named by
settings.

A file alone never makes code run, as with every configuration: who starts the pipeline names the
code on the command line. Programs of the checkout are trusted like the checkout itself.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_slm.config.code import names_code
from megatron_slm.config.load import to_mapping
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.pipeline.stages import PYTHON


def code_in_the_description_alone(
    description: Pipeline, words: list[str], checkout: Path
) -> Iterator[str]:
    """One sentence for everything that names code which the command line (`words`) does not."""
    given = " ".join(words)
    command = description.text.command
    if command and "--text." not in given and not _of_the_checkout(command, checkout):
        yield (
            f"text.command: the description names {command[0]}, and a file runs no code but that "
            "of the checkout (python launch/PROGRAM.py); if you trust it, give the command on "
            "the command line, in --text.command"
        )
    for where, value in _texts(to_mapping(description), ""):
        if names_code(value) and value not in given:
            yield (
                f"{where}: the description names {value}, and a file runs no code; if you trust "
                f"that Python file, name it on the command line too, in --{where}"
            )


def _of_the_checkout(command: list[str], checkout: Path) -> bool:
    """Whether the words run a Python file inside the checkout, and no link out of it."""
    if command[0] != PYTHON or len(command) < 2 or not command[1].endswith(".py"):
        return False
    file = os.path.realpath(command[1])
    return Path(file).is_relative_to(os.path.realpath(checkout / "launch")) and os.path.isfile(file)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """(dotted place, text) of every text in nested values, keys included."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            yield place, str(key)
            yield from _texts(inner, place)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, where)
    elif isinstance(value, str):
        yield where, value
