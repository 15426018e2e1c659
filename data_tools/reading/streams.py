"""From units to blocks: the parent's side of reading.

Compressed files and standard input are decompressed here, in order.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.reading.blocks import Block
from data_tools.reading.decompression import decompressed
from data_tools.reading.giant import GIANT_BYTES
from data_tools.reading.inputs import BLOCK_BYTES, STDIN, Unit


def blocks_of_units(
    units: Sequence[Unit],
    units_done: int = 0,
    unit_blocks_done: int = 0,
    *,
    spool_folder: str,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """All blocks in order, from the place where an interrupted run stood.

    A stream is read again from its beginning, and its blocks are skipped up to that place. A line
    of a stream that is too large to hold goes to a file `spill-...` in `spool_folder`, which the
    caller removes.
    """
    number = 0
    for unit_number in range(units_done, len(units)):
        unit = units[unit_number]
        skip = unit_blocks_done if unit_number == units_done else 0
        if unit.kind == "stream":
            spool = f"{spool_folder}/spill-line-{unit_number}"
            blocks = _blocks_of_stream(unit, block_bytes, spool)
        else:
            blocks = iter([Block(unit, source_bytes=unit.size_bytes)])
        for unit_block, block in enumerate(blocks):
            if unit_block < skip:
                if block.spool:
                    os.unlink(block.spool)
                continue
            yield dataclasses.replace(
                block, number=number, unit_number=unit_number, unit_block=unit_block
            )
            number += 1


def _blocks_of_stream(unit: Unit, block_bytes: int, spool: str) -> Iterator[Block]:
    """Whole lines in blocks of about `block_bytes`.

    Damage is reported in the last block, after all lines before it.
    """
    file = unit.files[0]
    try:
        # Closed by `with raw` below.
        raw = sys.stdin.buffer if file.path == STDIN else open(file.path, "rb")  # noqa: SIM115
    except OSError as error:
        yield Block(
            unit,
            data=b"",
            source_bytes=file.size_bytes,
            damage=error.strerror or str(error),
            damaged_bytes=file.size_bytes,
        )
        return
    with raw:
        consumed_before = 0
        for lines in _whole_lines(decompressed(file.compression, raw), block_bytes, spool):
            consumed = raw.tell() if file.size_bytes else 0
            unread_bytes = max(file.size_bytes - consumed_before, 1)
            yield Block(
                unit,
                data=lines.data,
                source_bytes=consumed - consumed_before,
                last_of_unit=lines.last,
                spool=lines.spool,
                damage=lines.damage,
                damaged_bytes=unread_bytes if lines.damage else 0,
            )
            consumed_before = consumed


@dataclass(frozen=True)
class _Lines:
    """Whole lines of a stream: in memory, or one giant line in a file."""

    data: bytes = b""
    spool: str = ""
    """Path of the file that holds the giant line."""
    last: bool = False
    damage: str = ""
    """Why the stream ended before its end."""


def _whole_lines(pieces: Iterator[bytes], block_bytes: int, spool: str) -> Iterator[_Lines]:
    """The lines of a stream. A line that damage cut short is left out."""
    kept: list[bytes] = []
    kept_bytes = 0
    spools = 0
    has_newline = False
    damage = ""
    while not damage:
        piece, damage = _next_piece(pieces)
        if not piece:
            break
        kept.append(piece)
        kept_bytes += len(piece)
        has_newline = has_newline or b"\n" in piece
        if kept_bytes >= block_bytes and has_newline:
            data = b"".join(kept)
            end = data.rfind(b"\n") + 1
            yield _Lines(data[:end])
            kept = [data[end:]]
            kept_bytes = len(data) - end
            has_newline = False
        elif kept_bytes > GIANT_BYTES and not has_newline:
            path = f"{spool}-{spools}"
            spools += 1
            rest, damage = _spool_line(path, kept, pieces)
            if damage:
                os.unlink(path)
                kept = []
                break
            yield _Lines(spool=path)
            kept = [rest]
            kept_bytes = len(rest)
            has_newline = b"\n" in rest
    data = b"".join(kept)
    if damage:
        data = data[: data.rfind(b"\n") + 1]
    yield _Lines(data, last=True, damage=damage)


def _next_piece(pieces: Iterator[bytes]) -> tuple[bytes, str]:
    """The next piece, empty at the end of the stream, and the damage that ended it early."""
    try:
        return next(pieces, b""), ""
    except (OSError, EOFError, ValueError) as error:
        return b"", str(error) or type(error).__name__


def _spool_line(path: str, kept: list[bytes], pieces: Iterator[bytes]) -> tuple[bytes, str]:
    """Write a line that began in `kept` to the file `path`.

    Returns what came after the line, and the damage that cut it short.
    """
    with open(path, "wb") as file:
        file.writelines(kept)
        while True:
            piece, damage = _next_piece(pieces)
            if damage:
                return b"", damage
            end = piece.find(b"\n")
            file.write(piece if end < 0 else piece[:end])
            if end >= 0:
                return piece[end + 1 :], ""
            if not piece:
                return b"", ""
