"""A block is what one worker turns into tokens at a time; reading a block yields its records in
order.

The worker itself reads blocks of kind `lines`, `files` and `rows`. A block of kind `stream` carries
bytes that the parent has decompressed. All lines begin inside their block; the last one may end
beyond it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.reading.decompression import decompressed
from data_tools.reading.documents import (
    BLANK_LINE,
    DAMAGED_FILE,
    BadRecord,
    Reject,
    text_of_bytes,
    text_of_line,
    text_of_record,
)
from data_tools.reading.giant import GIANT_BYTES, GiantText, giant_file, giant_line
from data_tools.reading.inputs import SourceFile, Unit

_READ_BYTES = 1 << 20
_ROWS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class Block:
    unit: Unit
    """What it is a part of."""
    number: int = 0
    """Position among all blocks of the run."""
    unit_number: int = 0
    """Position of its unit among all units."""
    unit_block: int = 0
    """Position inside its unit; only streams have more than one block in a unit."""
    data: bytes | None = None
    """The lines of a stream block."""
    source_bytes: int = 0
    """Bytes of the input file that this block stands for, before decompression."""
    last_of_unit: bool = True
    spool: str = ""
    """Path of a file that holds one giant line of a stream."""
    damage: str = ""
    """Why the stream ended before its end."""
    damaged_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    text: str
    fields: dict[str, Any]
    """The whole record, for a user's predicate."""
    path: str
    line: int
    """Counted from 1 inside the block."""


class BlockReader:
    """Reads blocks. `lines`, `read_bytes` and `digest` describe the block that was read last."""

    def __init__(self, keys: Sequence[str], separator: str) -> None:
        self._keys = tuple(keys)
        self._separator = separator
        self._begin()

    def _begin(self) -> None:
        self.lines = 0
        self.read_bytes = 0
        self.damaged_bytes = 0
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        return self._hash.digest()

    def add_to_digest(self, digest: bytes) -> None:
        """Add the digest of a giant document, whose content only its encoder reads."""
        self._hash.update(digest)

    def read(self, block: Block) -> Iterator[Record | Reject | GiantText]:
        self._begin()
        unit = block.unit
        if unit.kind == "files":
            for file in unit.files:
                yield self._read_text_file(file)
        elif unit.kind == "rows":
            yield from self._read_rows(unit)
        elif block.spool:
            yield self._read_giant_line(block.spool, unit.files[0], 0, os.path.getsize(block.spool))
        elif block.data is not None:
            yield from self._read_lines(unit.files[0], block.data, at_start=block.unit_block == 0)
            if block.damage:
                self.damaged_bytes += block.damaged_bytes
                yield Reject(unit.files[0].path, self.lines, DAMAGED_FILE, block.damage)
        else:
            yield from self._read_range(unit)

    def _read_text_file(self, file: SourceFile) -> Record | Reject | GiantText:
        kept: list[bytes] = []
        kept_bytes = 0
        try:
            for piece in _file_pieces(file):
                kept.append(piece)
                kept_bytes += len(piece)
                if kept_bytes > GIANT_BYTES:
                    self.read_bytes += file.size_bytes
                    return giant_file(file.path, lambda: _file_pieces(file))
        except (OSError, EOFError, ValueError) as error:
            self.damaged_bytes += file.size_bytes
            return Reject(
                file.path, 0, DAMAGED_FILE, getattr(error, "strerror", None) or str(error)
            )
        content = b"".join(kept)
        self.read_bytes += len(content)
        self._hash.update(len(content).to_bytes(8, "little") + content)
        try:
            text = text_of_bytes(content)
        except BadRecord as bad:
            return Reject(file.path, 0, bad.reason, bad.detail)
        return Record(text, {}, file.path, 0)

    def _read_range(self, unit: Unit) -> Iterator[Record | Reject | GiantText]:
        file = unit.files[0]
        try:
            data, giant = lines_of_range(file.path, unit.start, unit.end)
        except OSError as error:
            self.damaged_bytes += unit.size_bytes
            yield Reject(file.path, 0, DAMAGED_FILE, error.strerror or str(error))
            return
        yield from self._read_lines(file, data, at_start=unit.start == 0)
        if giant:
            yield self._read_giant_line(file.path, file, *giant)

    def _read_giant_line(
        self, path: str, file: SourceFile, start: int, end: int
    ) -> Reject | GiantText:
        self.lines += 1
        self.read_bytes += end - start
        try:
            return giant_line(path, file.path, self.lines, start, end, self._keys, self._separator)
        except BadRecord as bad:
            return Reject(file.path, self.lines, bad.reason, bad.detail)

    def _read_lines(
        self, file: SourceFile, data: bytes, *, at_start: bool
    ) -> Iterator[Record | Reject]:
        self.read_bytes += len(data)
        self._hash.update(data)
        if at_start:
            data = data.removeprefix(b"\xef\xbb\xbf")
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        keys = self._keys
        separator = self._separator
        for self.lines, line in enumerate(lines, start=1):
            if not line or line.isspace():
                yield Reject(file.path, self.lines, BLANK_LINE, "")
                continue
            try:
                text, fields = text_of_line(line, keys, separator)
            except BadRecord as bad:
                yield Reject(file.path, self.lines, bad.reason, bad.detail)
                continue
            yield Record(text, fields, file.path, self.lines)

    def _read_rows(self, unit: Unit) -> Iterator[Record | Reject]:
        import pyarrow.parquet

        file = unit.files[0]
        try:
            opened = pyarrow.parquet.ParquetFile(file.path)
            missing = [key for key in self._keys if key not in opened.schema_arrow.names]
            if missing:
                raise BadRecord(
                    "missing key",
                    f"no column {missing[0]!r}; the columns are {opened.schema_arrow.names}",
                )
            for batch in opened.iter_batches(
                _ROWS_PER_BATCH, row_groups=range(unit.start, unit.end)
            ):
                yield from self._rows_of_batch(file, batch)
        except BadRecord as bad:
            self.damaged_bytes += unit.size_bytes
            yield Reject(file.path, 0, bad.reason, bad.detail)
        except Exception as error:
            # pyarrow raises OSError, ArrowInvalid and others for the same kind of damage.
            self.damaged_bytes += unit.size_bytes
            yield Reject(file.path, 0, DAMAGED_FILE, f"{type(error).__name__}: {error}"[:200])

    def _rows_of_batch(self, file: SourceFile, batch: Any) -> Iterator[Record | Reject]:
        for fields in _rows(batch):
            self.lines += 1
            if isinstance(fields, BadRecord):
                yield Reject(file.path, self.lines, fields.reason, fields.detail)
                continue
            try:
                text = text_of_record(fields, self._keys, self._separator)
            except BadRecord as bad:
                yield Reject(file.path, self.lines, bad.reason, bad.detail)
                continue
            encoded = text.encode("utf-8")
            self.read_bytes += len(encoded)
            self._hash.update(len(encoded).to_bytes(8, "little") + encoded)
            yield Record(text, fields, file.path, self.lines)


def _rows(batch: Any) -> Iterator[dict[str, Any] | BadRecord]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # parquet writers do not check UTF-8: look for the row
    for row in range(batch.num_rows):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield BadRecord("invalid UTF-8", f"byte {error.start} of the value")


def _file_pieces(file: SourceFile) -> Iterator[bytes]:
    with open(file.path, "rb") as stream:
        yield from decompressed(file.compression, stream)


def lines_of_range(path: str, start: int, end: int) -> tuple[bytes, tuple[int, int] | None]:
    """The bytes of all lines that begin in [start, end), the last one to its end.

    Of a last line that is giant, only where it begins and ends in the file.
    """
    with open(path, "rb") as stream:
        position = start
        if start:
            # The line that began before `start` belongs to the block before: skip to its end.
            stream.seek(start - 1)
            position = start - 1
            while piece := stream.readline(_READ_BYTES):
                position += len(piece)
                if piece.endswith(b"\n") or position >= end:
                    break
            if not piece.endswith(b"\n"):
                return b"", None
        if position >= end:
            return b"", None
        data = stream.read(end - position)
        if data.endswith(b"\n") or not data:
            return data, None
        last_line = data.rfind(b"\n") + 1
        pieces = [data]
        data_bytes = len(data)
        while piece := stream.readline(_READ_BYTES):
            data_bytes += len(piece)
            if data_bytes - last_line <= GIANT_BYTES:
                pieces.append(piece)
            if piece.endswith(b"\n"):
                break
        if data_bytes - last_line > GIANT_BYTES:
            return data[:last_line], (position + last_line, position + data_bytes)
        return b"".join(pieces), None
