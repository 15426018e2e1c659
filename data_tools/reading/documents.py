"""Documents, and the records that are not documents: what every data program reads.

A record is one line of jsonl, one row of parquet or one text file. The functions `text_of_*` turn a
record into text, or raise `BadRecord` with the reason. They repair nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class BadRecord(Exception):
    """A record that holds no usable text.

    `reason` is one of a few short texts, so that it can be counted; `detail` is for the reader.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class InputDataError(Exception):
    """Bad data that stops a program (exit code 3)."""


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    id: str
    """file:line for jsonl, file:row for parquet, the path for a text file."""
    source: str
    """The --input argument it came through."""


@dataclass(frozen=True, slots=True)
class Reject:
    path: str
    line: int
    """Line, or row of a parquet file, from 1; 0 when the whole file is meant."""
    reason: str
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"file": self.path, "line": self.line, "reason": self.reason, "detail": self.detail}


EMPTY = "empty text"
BLANK_LINE = "blank line"
EMPTY_FILE = "empty file"
DAMAGED_FILE = "damaged or unreadable file"

HARMLESS = frozenset({BLANK_LINE, EMPTY_FILE})
"""Reasons that are normal in real folders and hand-made jsonl.

Such records are counted and listed, but they are no sign of damage: --max-bad-fraction ignores
them.
"""

HASH_BYTES = 16
"""Size of the hash of a text, by which duplicates are found."""
_EXCERPT_CHARACTERS = 80


def text_of_line(line: bytes, keys: Sequence[str], separator: str) -> tuple[str, dict[str, Any]]:
    """The text of one jsonl line, and the whole record for a user's predicate. Raises BadRecord."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(
            "invalid UTF-8",
            f"byte {error.start} of the line: {line[error.start : error.start + 8]!r}",
        ) from None
    except json.JSONDecodeError as error:
        raise BadRecord(
            "broken JSON", f"{error.msg} at character {error.pos + 1}; begins {_excerpt(line)}"
        ) from None
    except RecursionError:
        raise BadRecord("broken JSON", "nested too deeply") from None
    except ValueError as error:  # a number with more digits than Python reads
        raise BadRecord("broken JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadRecord(
            "not a JSON object", f"the line is a {type(record).__name__}; begins {_excerpt(line)}"
        )
    return text_of_record(record, keys, separator), record


def text_of_record(record: dict[str, Any], keys: Sequence[str], separator: str) -> str:
    """The value under the key, or under several keys joined by `separator`. Raises BadRecord."""
    parts = []
    for key in keys:
        if key not in record:
            raise BadRecord(
                "missing key", f"no {key!r}; the record has {_excerpt(sorted(map(str, record)))}"
            )
        value = record[key]
        if not isinstance(value, str):
            raise BadRecord("wrong type", f"{key!r} is {type(value).__name__}, expected a string")
        parts.append(value)
    text = parts[0] if len(parts) == 1 else separator.join(parts)
    check_text(text)
    return text


def text_of_bytes(content: bytes) -> str:
    """The text of one UTF-8 file, without a byte order mark. Raises BadRecord."""
    if not content:
        raise BadRecord(EMPTY_FILE)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\x00" in content:
            raise BadRecord("NUL bytes", "the file looks binary") from None
        raise BadRecord(
            "invalid UTF-8", f"byte {error.start}: {content[error.start : error.start + 8]!r}"
        ) from None
    if not text or text.isspace():
        raise BadRecord(EMPTY_FILE, "only white space")
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raises BadRecord for a text that is empty, looks binary or has no UTF-8 form."""
    if not text or text.isspace():
        raise BadRecord(EMPTY)
    if "\x00" in text:
        raise BadRecord(
            "NUL bytes", f"at character {text.index(chr(0)) + 1}; the text looks binary"
        )
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecord(
                "lone surrogate",
                f"character {error.start + 1} is half of a pair and has no UTF-8 form",
            ) from None


def text_bytes(text: str) -> int:
    """Size of the text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _excerpt(value: Any) -> str:
    text = repr(value if not isinstance(value, bytes) else value[:_EXCERPT_CHARACTERS])
    return text if len(text) <= _EXCERPT_CHARACTERS else text[:_EXCERPT_CHARACTERS] + "…"
