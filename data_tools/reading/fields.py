"""Records with all their fields, of jsonl, parquet and JSON arrays, one file after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_tools.reading.decompression import decompressed
from data_tools.reading.documents import InputDataError
from data_tools.reading.inputs import SourceFile

_ROWS_PER_BATCH = 1024


def records_of(file: SourceFile) -> Iterator[dict[str, Any] | str]:
    """The records of a file in order; a reason in place of one that cannot be read.

    A .json file may hold one array of objects, as published data sets do, or a record per line.
    InputDataError: a file of plain text, or one that cannot be read to its end.
    """
    if file.file_format == "text":
        raise InputDataError(f"{file.path}: expected .jsonl, .json or .parquet, which have fields")
    try:
        if file.file_format == "parquet":
            yield from _rows(file.path)
        elif file.path.lower().endswith(".json"):
            yield from _of_json(file.path)
        else:
            yield from _of_lines(file)
    except (OSError, EOFError, ValueError) as error:
        raise InputDataError(f"{file.path}: {error}") from None


def _rows(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_ROWS_PER_BATCH):
        yield from batch.to_pylist()


def _of_lines(file: SourceFile) -> Iterator[dict[str, Any] | str]:
    pending = b""
    with open(file.path, "rb") as raw:
        for piece in decompressed(file.compression, raw):
            *lines, pending = (pending + piece).split(b"\n")
            yield from map(_record, filter(bytes.strip, lines))
    if pending.strip():
        yield _record(pending)


def _record(line: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "broken JSON"
    return record if isinstance(record, dict) else "not a JSON object"


def _of_json(path: str) -> Iterator[dict[str, Any] | str]:
    """An array is decoded object by object: its text is held in memory, its objects are not."""
    with open(path, encoding="utf-8-sig") as stream:
        text = stream.read()
    decoder = json.JSONDecoder()
    position = _after_space(text, 0)
    in_array = text.startswith("[", position)
    position += in_array
    while (position := _after_space(text, position)) < len(text):
        if in_array and text[position] in ",]":
            position += 1
            continue
        try:
            record, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise ValueError(f"not valid JSON ({error})") from None
        yield record if isinstance(record, dict) else "not a JSON object"


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
