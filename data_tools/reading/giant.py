"""Documents too large to hold: a text file or a jsonl line of gigabytes, read in pieces.

`scan` proves the document good (UTF-8, JSON, no NUL, not empty) without keeping it; a second pass
over its pieces encodes it (encoding/giant_encoding.py). Both need memory for a few pieces only.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_tools.reading.documents import EMPTY, HASH_BYTES, BadRecord, text_of_record

GIANT_BYTES = 16 << 20
"""Records larger than this are read in pieces, which is slower."""
PIECE_BYTES = 1 << 20
_PLACEHOLDER = "\0giant:"
_POSSESSIVE = "+" if sys.version_info >= (3, 11) else ""
"""After a repetition: it keeps no places to come back to, and so no memory for each escape. Nothing
follows the repetitions below, so Python 3.10, which has no such mark, matches the same without it.
"""
_STRING_BODY = re.compile(
    r"""[^"\\]*{0}(?:\\.[^"\\]*{0})*{0}""".replace("{0}", _POSSESSIVE).encode(), re.DOTALL
)
_WHOLE_ESCAPES = re.compile(
    rf"(?:[^\\]+{_POSSESSIVE}"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}"  # a surrogate pair
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    rf"|\\[^u])*{_POSSESSIVE}",
    re.DOTALL,
)
_LONGEST_ESCAPE = 12
"""Characters of an escaped surrogate pair."""


@dataclass(frozen=True)
class GiantText:
    """A document whose text can be read in pieces, any number of times."""

    path: str
    line: int
    fields: dict[str, Any]
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Scan:
    """What `scan` found out about a giant document."""

    characters: int
    text_bytes: int
    digest: bytes
    must_stay_whole: bool
    """Whether the text holds a string that forbids cutting it."""


def giant_line(
    path: str, name: str, line: int, start: int, end: int, keys: Sequence[str], separator: str
) -> GiantText:
    """The document of one long jsonl line at [start, end) of `path`. Raises BadRecord."""
    with open(path, "rb") as stream:
        skeleton, long_strings = _skeleton(stream, start, end)
    try:
        record = json.loads(skeleton.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRecord("invalid UTF-8", f"in a line of {end - start} bytes") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(
            "broken JSON", f"{error}, in a line of {end - start} bytes, long strings left out"
        ) from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object", f"the line is a {type(record).__name__}")
    # A mark holds a NUL, which text_of_record refuses: show it "x" in place of each mark.
    texts = {key: record[key] for key in keys if isinstance(record.get(key), str)}
    marked = {key for key, text in texts.items() if text.startswith(_PLACEHOLDER)}
    text_of_record({**record, **dict.fromkeys(marked, "x")}, keys, separator)

    def pieces() -> Iterator[str]:
        for number, key in enumerate(keys):
            if number:
                yield separator
            if key not in marked:
                yield record[key]
                continue
            span = long_strings[int(record[key].removeprefix(_PLACEHOLDER))]
            with open(path, "rb") as stream:
                yield from _unescaped(_pieces_of(stream, *span))

    fields = {key: value for key, value in record.items() if key not in marked}
    return GiantText(name, line, fields, pieces)


def giant_file(path: str, open_pieces: Callable[[], Iterator[bytes]]) -> GiantText:
    """The document of one long text file whose bytes come from `open_pieces()`."""

    def pieces() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        for piece in open_pieces():
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)

    return GiantText(path, 0, {}, pieces)


def scan(document: GiantText, forbidden: Sequence[str]) -> Scan:
    """Check the whole text without keeping it. Raises BadRecord where check_text would."""
    characters = 0
    size_bytes = 0
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    blank = True
    has_forbidden = False
    tail = ""
    overlap = max(map(len, forbidden), default=1) - 1  # a mark may lie across two pieces
    try:
        for piece in document.pieces():
            if "\0" in piece:
                raise BadRecord("NUL bytes", f"after character {characters}; the text looks binary")
            encoded = piece.encode("utf-8")
            characters += len(piece)
            size_bytes += len(encoded)
            digest.update(encoded)
            blank = blank and (not piece or piece.isspace())
            searched = tail + piece
            has_forbidden = has_forbidden or any(mark in searched for mark in forbidden)
            tail = searched[-overlap:] if overlap else ""
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"after character {characters}: {error.reason}") from None
    except UnicodeEncodeError:
        raise BadRecord(
            "lone surrogate", f"after character {characters}: half of a pair has no UTF-8 form"
        ) from None
    if blank:
        raise BadRecord(EMPTY)
    return Scan(characters, size_bytes, digest.digest(), has_forbidden)


def _pieces_of(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    stream.seek(start)
    while start < end and (piece := stream.read(min(PIECE_BYTES, end - start))):
        start += len(piece)
        yield piece


def _skeleton(stream: BinaryIO, start: int, end: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The JSON line at [start, end) with a mark in place of every string longer than a piece.

    Also where those strings are in the file, quotes excluded.
    """
    skeleton = _Skeleton()
    position = start
    pending = b""
    for piece in _pieces_of(stream, start, end):
        data = pending + piece
        pending = skeleton.add(data, position)
        position += len(data) - len(pending)
        if skeleton.kept_bytes > GIANT_BYTES:
            raise BadRecord(
                "too long a record",
                f"the line has {end - start} bytes, and most of them are not one long text",
            )
    if skeleton.in_string:
        raise BadRecord("broken JSON", f"a string does not end, in a line of {end - start} bytes")
    return b"".join(skeleton.kept), skeleton.long_strings


class _Skeleton:
    """What is kept of a JSON line while its pieces go by."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.kept_bytes = 0
        self.long_strings: list[tuple[int, int]] = []
        """[start, end) in the file of each string that a mark stands for."""
        self.in_string = False
        self._string_start = 0
        self._string_kept: list[bytes] = []

    def add(self, data: bytes, position: int) -> bytes:
        """Go through `data`, which lies at `position` of the file.

        Returns the end of it that cannot be understood without the next piece.
        """
        at = 0
        while at < len(data):
            if not self.in_string:
                at = self._copy_to_quote(data, at, position)
                continue
            body = _STRING_BODY.match(data, at)
            assert body is not None  # the pattern matches the empty string
            stop = body.end()
            if position + stop - self._string_start <= PIECE_BYTES:
                self._string_kept.append(data[at:stop])
            at = stop
            if data[at : at + 1] == b"\\":
                return data[at:]  # a backslash at the very end escapes the next piece's first byte
            if at < len(data):
                self._close_string(position + at)
                at += 1
        return b""

    def _copy_to_quote(self, data: bytes, at: int, position: int) -> int:
        """Keep what lies outside of strings; returns where the next string begins in `data`."""
        quote = data.find(b'"', at)
        stop = len(data) if quote < 0 else quote + 1
        self.kept.append(data[at:stop])
        self.kept_bytes += stop - at
        if quote >= 0:
            self.in_string = True
            self._string_start = position + stop
            self._string_kept = []
        return stop

    def _close_string(self, end: int) -> None:
        """Keep the string that ends at `end` of the file, or a mark in its place."""
        string_bytes = end - self._string_start
        if string_bytes > PIECE_BYTES:
            self.kept.append(b"\\u0000giant:%d" % len(self.long_strings))
            self.long_strings.append((self._string_start, end))
        else:
            self.kept.append(b"".join(self._string_kept))
            self.kept_bytes += string_bytes
        self.kept.append(b'"')
        self.in_string = False


def _unescaped(pieces: Iterator[bytes]) -> Iterator[str]:
    """The text of a JSON string's raw content.

    Pieces are cut so that none ends inside an escape or a surrogate pair.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    carry = ""
    for piece in pieces:
        carry += decoder.decode(piece)
        whole = _WHOLE_ESCAPES.match(carry)
        assert whole is not None  # the pattern matches the empty string
        end = whole.end()
        if len(carry) - end >= _LONGEST_ESCAPE:
            is_surrogate = carry[end : end + 3].lower().startswith("\\ud")
            raise BadRecord(
                "lone surrogate" if is_surrogate else "broken JSON",
                f"bad escape {carry[end : end + _LONGEST_ESCAPE]!r}",
            )
        yield _loads(carry[:end])
        carry = carry[end:]
    decoder.decode(b"", final=True)
    if carry:
        yield _loads(carry)


def _loads(body: str) -> str:
    try:
        return json.loads(f'"{body}"')
    except ValueError as error:
        raise BadRecord("broken JSON", f"in a long string: {error}"[:120]) from None
