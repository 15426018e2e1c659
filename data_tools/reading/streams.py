"""From units to blocks: the parent's side of reading. Compressed files and standard input are decompressed here, in order."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

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
    """All blocks in order, from the place where an interrupted run stood. Streams are read again and skipped up to it.

    A line of a stream that is too large to hold goes to a file `spill-...` in `spool_folder`, which the caller removes.
    """
    number = 0
    for unit_number in range(units_done, len(units)):
        unit = units[unit_number]
        skip = unit_blocks_done if unit_number == units_done else 0
        blocks = (
            _blocks_of_stream(unit, block_bytes, f"{spool_folder}/spill-line-{unit_number}")
            if unit.kind == "stream"
            else iter([Block(0, 0, 0, unit, source_bytes=unit.size_bytes)])
        )
        for unit_block, block in enumerate(blocks):
            if unit_block < skip:
                if block.spool:
                    os.unlink(block.spool)
                continue
            yield dataclasses.replace(block, number=number, unit=unit_number, unit_block=unit_block)
            number += 1


def _blocks_of_stream(unit: Unit, block_bytes: int, spool: str) -> Iterator[Block]:
    """Whole lines in blocks of about `block_bytes`; damage is reported in the last block, after all lines before it."""
    file = unit.files[0]
    try:
        # Closed by `with raw` below.
        raw = sys.stdin.buffer if file.path == STDIN else open(file.path, "rb")  # noqa: SIM115
    except OSError as error:
        yield Block(
            0,
            0,
            0,
            unit,
            b"",
            file.size_bytes,
            damage=error.strerror or str(error),
            damaged_bytes=file.size_bytes,
        )
        return
    with raw:
        consumed_before = 0
        for data, spooled, exhausted, damage in _whole_lines(
            decompressed(file.compression, raw), block_bytes, spool
        ):
            consumed = raw.tell() if file.size_bytes else 0
            yield Block(
                0,
                0,
                0,
                unit,
                data,
                consumed - consumed_before,
                exhausted,
                spooled,
                damage,
                max(file.size_bytes - consumed_before, 1) if damage else 0,
            )
            consumed_before = consumed


def _whole_lines(
    pieces: Iterator[bytes], block_bytes: int, spool: str
) -> Iterator[tuple[bytes, str, bool, str]]:
    """(lines, file of one giant line, whether they are the last, damage). A line that damage cut short is not given."""
    kept: list[bytes] = []
    kept_bytes = spools = 0
    has_newline = False
    damage = ""
    while True:
        try:
            piece = next(pieces, b"")
        except (OSError, EOFError, ValueError) as error:
            piece, damage = b"", str(error)
        if not piece:
            break
        kept.append(piece)
        kept_bytes += len(piece)
        has_newline = has_newline or b"\n" in piece
        if kept_bytes >= block_bytes and has_newline:
            data = b"".join(kept)
            end = data.rfind(b"\n") + 1
            yield data[:end], "", False, ""
            kept, kept_bytes, has_newline = [data[end:]], len(data) - end, False
        elif kept_bytes > GIANT_BYTES and not has_newline:
            path = f"{spool}-{spools}"
            spools += 1
            rest, damage = _spool_line(path, kept, pieces)
            if damage:
                os.unlink(path)
                kept = []
                break
            yield b"", path, False, ""
            kept, kept_bytes, has_newline = [rest], len(rest), b"\n" in rest
    data = b"".join(kept)
    yield (data[: data.rfind(b"\n") + 1] if damage else data), "", True, damage


def _spool_line(path: str, kept: list[bytes], pieces: Iterator[bytes]) -> tuple[bytes, str]:
    """Write a line that began in `kept` to `path`; returns what came after it, and the damage that cut it short."""
    with open(path, "wb") as stream:
        stream.writelines(kept)
        while True:
            try:
                piece = next(pieces, b"")
            except (OSError, EOFError, ValueError) as error:
                return b"", str(error)
            end = piece.find(b"\n")
            stream.write(piece if end < 0 else piece[:end])
            if end >= 0 or not piece:
                return piece[end + 1 :] if end >= 0 else b"", ""
