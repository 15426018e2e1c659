"""gzip and zstd, read in pieces of bounded size.

A damaged file gives all its good pieces first, then an error.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO

_READ_BYTES = 1 << 20


def decompressed(compression: str, raw: BinaryIO) -> Iterator[bytes]:
    """The content in pieces of bounded size.

    Raises EOFError or ValueError after the last good piece of a damaged file.
    """
    if compression == "gz":
        return _gunzip(raw)
    if compression == "zst":
        return _unzstd(raw)
    return iter(lambda: raw.read(_READ_BYTES), b"")


def _gunzip(raw: BinaryIO) -> Iterator[bytes]:
    member = None
    pending = b""
    while pending or (pending := raw.read(_READ_BYTES)):
        if member is None:
            pending = pending.lstrip(b"\0")  # some writers pad between members
            if not pending:
                continue
            member = zlib.decompressobj(wbits=31)
        try:
            piece = member.decompress(pending, _READ_BYTES << 2)
        except zlib.error as error:
            raise ValueError(f"not valid gzip: {error}") from None
        pending = member.unconsumed_tail
        if piece:
            yield piece
        if member.eof:
            pending = member.unused_data
            member = None
    if member is not None:
        raise EOFError("the gzip stream ends before its end marker: the file is truncated")


def _unzstd(raw: BinaryIO) -> Iterator[bytes]:
    import zstandard

    frame = None
    pending = b""
    # Small reads: zstd returns everything that a piece of input decompresses to at once.
    while pending or (pending := raw.read(_READ_BYTES >> 4)):
        frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            piece = frame.decompress(pending)
        except zstandard.ZstdError as error:
            raise ValueError(f"not valid zstd: {error}") from None
        pending = b""
        if piece:
            yield piece
        if frame.eof:
            pending = frame.unused_data
            frame = None
    if frame is not None:
        raise EOFError("the zstd stream ends inside a frame: the file is truncated")
