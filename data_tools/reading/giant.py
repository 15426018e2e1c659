"""Documents too large to hold: a text file or a jsonl line of gigabytes, read in pieces.

`scan` proves the document good (UTF-8, JSON, no NUL, not empty) without keeping it; a second pass
over its pieces encodes it (encoding/giant_encoding.py). Both need memory for a few pieces only.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_tools.reading.documents import EMPTY, HASH_BYTES, BadRecord, text_of_record

GIANT_BYTES = 16 << 20
"""Records beyond this take the slow, lean path."""
PIECE_BYTES = 1 << 20
_PLACEHOLDER = "\0giant:"
_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_WHOLE_ESCAPES = re.compile(
    r"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+",
    re.DOTALL,
)
_LONGEST_ESCAPE = 12


@dataclass(frozen=True)
class GiantText:
    """A document whose text comes in pieces, as often as asked."""

    path: str
    line: int
    fields: dict[str, Any]
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Scan:
    characters: int
    text_bytes: int
    digest: bytes
    must_stay_whole: bool


def giant_line(
    path: str, name: str, line: int, start: int, end: int, keys: Sequence[str], separator: str
) -> GiantText:
    """The document of one long jsonl line at [start, end) of `path`. Raises BadRecord."""
    with open(path, "rb") as stream:
        skeleton, spans = _skeleton(stream, start, end)
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
    # The marks hold a NUL, so look for them before the ordinary check for text would refuse it.
    marked = {
        key: record[key].startswith(_PLACEHOLDER)
        for key in keys
        if isinstance(record.get(key), str)
    }
    text_of_record(
        {**record, **{key: "x" for key, is_mark in marked.items() if is_mark}}, keys, separator
    )

    def pieces() -> Iterator[str]:
        for number, key in enumerate(keys):
            if number:
                yield separator
            if not marked[key]:
                yield record[key]
                continue
            span = spans[int(record[key].removeprefix(_PLACEHOLDER))]
            with open(path, "rb") as stream:
                yield from _unescaped(_pieces_of(stream, *span))

    return GiantText(
        name, line, {key: value for key, value in record.items() if not marked.get(key)}, pieces
    )


def giant_file(path: str, open_pieces: Callable[[], Iterator[bytes]]) -> GiantText:
    """The document of one long text file whose bytes come from `open_pieces()`."""

    def pieces() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        for piece in open_pieces():
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)

    return GiantText(path, 0, {}, pieces)


def scan(document: GiantText, forbidden: Sequence[str]) -> Scan:
    """Check the whole text without keeping it. Raises BadRecord for what an ordinary record would be rejected for."""
    characters = size_bytes = 0
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    blank, whole, tail = True, False, ""
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
            seen = tail + piece
            whole = whole or any(mark in seen for mark in forbidden)
            tail = seen[-overlap:] if overlap else ""
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"after character {characters}: {error.reason}") from None
    except UnicodeEncodeError:
        raise BadRecord(
            "lone surrogate", f"after character {characters}: half of a pair has no UTF-8 form"
        ) from None
    if blank:
        raise BadRecord(EMPTY)
    return Scan(characters, size_bytes, digest.digest(), whole)


def _pieces_of(stream: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    stream.seek(start)
    while start < end and (piece := stream.read(min(PIECE_BYTES, end - start))):
        start += len(piece)
        yield piece


def _skeleton(stream: BinaryIO, start: int, end: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The line with every string of more than a piece replaced by a mark, and where those strings are (quotes excluded)."""
    kept: list[bytes] = []
    kept_bytes = 0
    spans: list[tuple[int, int]] = []
    inside, string_start, string_kept = False, 0, []
    position, pending = start, b""
    for piece in _pieces_of(stream, start, end):
        data = pending + piece
        position -= len(pending)
        pending = b""
        at = 0
        while at < len(data):
            if not inside:
                quote = data.find(b'"', at)
                upto = len(data) if quote < 0 else quote + 1
                kept.append(data[at:upto])
                kept_bytes += upto - at
                at = upto
                if quote >= 0:
                    inside, string_start, string_kept = True, position + at, []
                continue
            stop = _STRING_BODY.match(data, at).end()
            if position + stop - string_start <= PIECE_BYTES:
                string_kept.append(data[at:stop])
            at = stop
            if at == len(data):
                break
            if (
                data[at : at + 1] == b"\\"
            ):  # a backslash at the very end: its partner is in the next piece
                pending = data[at:]
                break
            if position + at - string_start > PIECE_BYTES:
                kept.append(b"\\u0000giant:%d" % len(spans))
                spans.append((string_start, position + at))
            else:
                kept.append(b"".join(string_kept))
                kept_bytes += position + at - string_start
            kept.append(b'"')
            at += 1
            inside = False
        if kept_bytes > GIANT_BYTES:
            raise BadRecord(
                "too long a record",
                f"the line has {end - start} bytes, and most of them are not one long text",
            )
        position += len(data)
    if inside:
        raise BadRecord("broken JSON", f"a string does not end, in a line of {end - start} bytes")
    return b"".join(kept), spans


def _unescaped(pieces: Iterator[bytes]) -> Iterator[str]:
    """The text of a JSON string's raw content, escapes undone; pieces never end inside an escape or a surrogate pair."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    carry = ""
    for piece in pieces:
        carry += decoder.decode(piece)
        end = _WHOLE_ESCAPES.match(carry).end()
        if len(carry) - end >= _LONGEST_ESCAPE:
            raise BadRecord(
                "lone surrogate"
                if carry[end : end + 3].lower().startswith("\\ud")
                else "broken JSON",
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
