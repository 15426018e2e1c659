"""The few filters: exact duplicates, bounds of the length, a user's predicate.

Every document that a filter drops is counted in the report. Cleaning of text belongs to a cleaning
framework, whose output preprocess reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.reading.blocks import Record
from data_tools.reading.documents import HASH_BYTES, BadRecord, Reject


@dataclass(frozen=True)
class FilterSettings:
    """Part of the identity of a run: it decides which documents the corpus has."""

    min_characters: int = 0
    max_characters: int = 0
    """0 = no bound."""
    keep_if: str = ""
    """FILE.py:FUNCTION of (text, record) -> bool."""
    drop_duplicates: bool = False


class Filters:
    def __init__(self, settings: FilterSettings) -> None:
        self._settings = settings
        self._keep_if = load_predicate(settings.keep_if) if settings.keep_if else None
        self.wants_hashes = settings.drop_duplicates

    def reason_to_drop(self, record: Record) -> str | Reject | None:
        """The name of the filter that drops this record; None when all keep it.

        A Reject when the user's predicate raised an exception.
        """
        if reason := self._length_reason(len(record.text)):
            return reason
        if self._keep_if is not None:
            try:
                keep = self._keep_if(record.text, record.fields)
            except Exception as error:  # the user's code may raise anything
                return Reject(
                    record.path,
                    record.line,
                    "--keep-if failed",
                    f"{type(error).__name__}: {error}"[:200],
                )
            if not keep:
                return "refused by --keep-if"
        return None

    def reason_to_drop_giant(self, characters: int) -> str | None:
        """As `reason_to_drop`, for a document that is never in memory as a whole.

        Raises BadRecord when there is a predicate, which would need the whole text.
        """
        if reason := self._length_reason(characters):
            return reason
        if self._keep_if is not None:
            raise BadRecord(
                "too large for --keep-if",
                f"{characters} characters; bound them with --max-characters",
            )
        return None

    def _length_reason(self, characters: int) -> str | None:
        if characters < self._settings.min_characters:
            return "shorter than --min-characters"
        if 0 < self._settings.max_characters < characters:
            return "longer than --max-characters"
        return None

    @staticmethod
    def hash_of(text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest()


def load_predicate(argument: str) -> Callable[[str, dict[str, Any]], bool]:
    """The function named by FILE.py:FUNCTION. Raises ValueError when there is none."""
    file_name, _, function_name = argument.rpartition(":")
    if not file_name or not Path(file_name).is_file():
        raise ValueError(f"--keep-if {argument}: expected FILE.py:FUNCTION with an existing file")
    specification = importlib.util.spec_from_file_location("slm_keep_if", file_name)
    if specification is None or specification.loader is None:
        raise ValueError(f"--keep-if {argument}: {file_name} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses in the user's file look up their module here.
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"--keep-if {argument}: running {file_name} failed: {type(error).__name__}: {error}"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--keep-if {argument}: {file_name} has no function {function_name!r}")
    return function
