"""The .bin/.idx pair of megatron-core, read and written without torch.

Little endian: magic 9 bytes, u64 version 1, u8 dtype code, u64 S sequences, u64 D = documents + 1,
then i32 lengths in tokens (S), i64 byte offsets (S), i64 document indices (D). `.bin` holds the
tokens back to back. The bytes equal those of megatron-core's IndexedDatasetBuilder; a test compares
the two.

megatron-core checks none of the sizes when it opens a pair, so `read_index` checks all of them.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_slm.data.file_array import FileArray, ReadOnlyFile

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_OF_CODE: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1
_PIECE = 1 << 20


@dataclass(frozen=True)
class CorpusIndex:
    """The content of an .idx. Its arrays stay in the file: a slice reads what it covers."""

    dtype: np.dtype
    sequence_lengths_tokens: FileArray  # int32, S
    sequence_offsets_bytes: FileArray  # int64, S
    document_indices: FileArray  # int64, documents + 1; counts sequences

    @property
    def documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def bin_bytes(self) -> int:
        """Size the .bin must have."""
        if not len(self.sequence_lengths_tokens):
            return 0
        return (
            int(self.sequence_offsets_bytes[-1])
            + int(self.sequence_lengths_tokens[-1]) * self.dtype.itemsize
        )

    @property
    def tokens(self) -> int:
        return self.bin_bytes // self.dtype.itemsize

    def has_trainable_tokens(self) -> bool:
        """Whether any token has one before it in its sequence.

        The first token of each is never trained on, because it has no context.
        """
        sequences = len(self.sequence_lengths_tokens)
        if self.tokens > sequences:
            return True
        return any(
            (self.sequence_lengths_tokens[start : start + _PIECE] > 1).any()
            for start in range(0, sequences, _PIECE)
        )

    def document_starts_tokens(self) -> np.ndarray:
        """Token offset at which each document begins, then the total (int64, documents + 1)."""
        bounds_tokens = np.append(
            self.sequence_offsets_bytes[:] // self.dtype.itemsize, self.tokens
        )
        return bounds_tokens[self.document_indices[:]]

    def document_at(self, offset_tokens: int) -> int:
        """The number of the document that holds this token, in a few dozen small reads."""
        offset_bytes = offset_tokens * self.dtype.itemsize
        sequence = bisect_right(self.sequence_offsets_bytes, offset_bytes) - 1
        return bisect_right(self.document_indices, sequence) - 1

    def non_empty_starts_tokens(self) -> np.ndarray:
        """Token offset at which each sequence with tokens begins (int64)."""
        offsets_bytes = self.sequence_offsets_bytes[:]
        return offsets_bytes[self.sequence_lengths_tokens[:] > 0] // self.dtype.itemsize


def read_index(path: str | Path) -> CorpusIndex:
    """Open an .idx and check all of it: as `open_index`, and lengths, offsets and document order.

    Raises ValueError with a sentence naming the file and what is wrong. Reads 20 bytes per
    document.
    """
    index = open_index(path)
    _check_index(Path(path), index)
    return index


def open_index(path: str | Path) -> CorpusIndex:
    """Open an .idx that was checked before: magic, version, dtype and file size are looked at.

    Raises ValueError with a sentence naming the file and what is wrong. Codes other than those of
    uint16 and int32 are refused: float codes mean different things in Megatron and NeoX, and no
    token file uses them.
    """
    path = Path(path)
    file = ReadOnlyFile(path)
    size_bytes = file.size_bytes
    header = FileArray(file, np.uint8, min(size_bytes, HEADER_BYTES))[:].tobytes()
    if len(header) < HEADER_BYTES or header[:9] != MAGIC:
        raise ValueError(
            f"{path}: not a megatron-core index (it has {size_bytes} bytes and begins "
            f"{header[:9]!r})"
        )
    version, code, sequences, bounds = struct.unpack("<QBQQ", header[9:])
    if version != 1:
        raise ValueError(f"{path}: index version {version}, expected 1")
    if code not in DTYPE_OF_CODE:
        raise ValueError(f"{path}: dtype code {code}; a token index has 8 (uint16) or 4 (int32)")
    expected_bytes = HEADER_BYTES + 12 * sequences + 8 * bounds
    if size_bytes != expected_bytes:
        word = "truncated" if size_bytes < expected_bytes else "too long"
        raise ValueError(
            f"{path}: the index is {word}: {size_bytes} bytes, but {sequences} sequences and "
            f"{bounds} document bounds need {expected_bytes}"
        )
    return _index_of(file, DTYPE_OF_CODE[code], sequences, bounds)


def _index_of(file: ReadOnlyFile, dtype: np.dtype, sequences: int, bounds: int) -> CorpusIndex:
    return CorpusIndex(
        dtype=dtype,
        sequence_lengths_tokens=FileArray(file, "<i4", sequences, HEADER_BYTES),
        sequence_offsets_bytes=FileArray(file, "<i8", sequences, HEADER_BYTES + 4 * sequences),
        document_indices=FileArray(file, "<i8", bounds, HEADER_BYTES + 12 * sequences),
    )


def _check_index(path: Path, index: CorpusIndex) -> None:
    lengths = index.sequence_lengths_tokens
    offsets = index.sequence_offsets_bytes
    bounds = index.document_indices
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(lengths):
        raise ValueError(f"{path}: document bounds must run from 0 to {len(lengths)} sequences")
    expected_bytes = 0
    for start in range(0, len(lengths), _PIECE):  # in pieces: an index of 1e9 documents is 20 GB
        part = lengths[start : start + _PIECE].astype(np.int64)
        if part.min() < 0:
            number = start + int(part.argmin())
            raise ValueError(f"{path}: sequence {number} has a negative length ({part.min()})")
        ends = expected_bytes + np.cumsum(part) * index.dtype.itemsize
        wrong = np.flatnonzero(
            offsets[start : start + _PIECE] != ends - part * index.dtype.itemsize
        )
        if len(wrong):
            number = start + int(wrong[0])
            raise ValueError(
                f"{path}: sequence {number} does not start where the one before it ends"
            )
        expected_bytes = int(ends[-1])
    for start in range(0, len(bounds) - 1, _PIECE):
        if np.any(np.diff(bounds[start : start + _PIECE + 1]) < 0):
            raise ValueError(f"{path}: document bounds go backwards near document {start}")


def check_bin_size(prefix: str | Path, index: CorpusIndex) -> None:
    """Raise ValueError unless PREFIX.bin exists and has exactly the size its index asks for."""
    path = Path(f"{prefix}.bin")
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot read the tokens ({error.strerror})") from None
    if size_bytes != index.bin_bytes:
        word = "truncated" if size_bytes < index.bin_bytes else "too long"
        raise ValueError(
            f"{path}: the token file is {word}: {size_bytes} bytes, but its index asks for "
            f"{index.bin_bytes}"
        )


def open_tokens(prefix: str | Path, index: CorpusIndex) -> FileArray:
    """All tokens of PREFIX.bin, read on access; its size is checked here."""
    check_bin_size(prefix, index)
    return FileArray(ReadOnlyFile(f"{prefix}.bin"), index.dtype, index.tokens)


def write_index(
    stream: BinaryIO,
    dtype: np.dtype,
    lengths_tokens: np.ndarray | FileArray,
    update: Callable[[bytes], object] = lambda piece: None,
) -> None:
    """Write an .idx of documents that are one sequence each, the way megatron-core's builder does.

    `lengths_tokens` (int32, an array or a FileArray) is read in pieces, so memory does not grow
    with the corpus. `update` gets every written piece: a hash's update method gives the checksum
    without a second pass.
    """

    def put(piece: bytes) -> None:
        stream.write(piece)
        update(piece)

    documents = len(lengths_tokens)
    put(MAGIC + struct.pack("<QBQQ", 1, CODE_OF_DTYPE[np.dtype(dtype)], documents, documents + 1))
    for start in range(0, documents, _PIECE):
        put(lengths_tokens[start : start + _PIECE].astype("<i4").tobytes())
    offset_bytes = 0
    for start in range(0, documents, _PIECE):
        part_bytes = (
            lengths_tokens[start : start + _PIECE].astype(np.int64) * np.dtype(dtype).itemsize
        )
        ends = offset_bytes + np.cumsum(part_bytes)
        put((ends - part_bytes).astype("<i8").tobytes())
        offset_bytes = int(ends[-1])
    for start in range(0, documents + 1, _PIECE):
        put(np.arange(start, min(start + _PIECE, documents + 1), dtype="<i8").tobytes())
