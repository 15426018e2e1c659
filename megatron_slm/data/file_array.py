"""Arrays in files, of which only the requested positions are read. No torch.

They are not mapped. When a file is cut short while a process has it mapped, access to the missing
part kills the process with SIGBUS and no message; a read by position returns fewer bytes instead,
so that the error can name the file. The cost is one system call for each range that is read, no
more than slicing a numpy memmap and copying the slice.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt


class UnreadableFile(ValueError):
    """A file that was sound when it was opened cannot be read any more. Names the file."""


class ReadOnlyFile:
    """An open file that threads and forked processes may read at once. Pickles by its path."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnreadableFile(f"{self.path}: cannot be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = self._written_at()

    def __reduce__(self):
        return ReadOnlyFile, (self.path,)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def check_unchanged(self) -> None:
        """UnreadableFile when something has written to the file since it was opened.

        It costs a third of a microsecond. A file that was removed or replaced is no problem: what
        was opened is what is read.
        """
        size_bytes, written_at = self._written_at()
        if size_bytes < self._stamp[0]:
            raise UnreadableFile(
                f"{self.path}: the file was cut short while it was in use, from "
                f"{self._stamp[0]:,} to {size_bytes:,} bytes. Copy it again or make it again, then "
                "start the same command again."
            )
        if (size_bytes, written_at) != self._stamp:
            raise UnreadableFile(
                f"{self.path}: the file was written to while it was in use. What is read from it "
                "is no longer what was checked when it was opened. Make sure that nothing writes "
                "to it, then start the same command again: its content is checked then."
            )

    def _written_at(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, count_bytes: int, offset_bytes: int) -> bytes:
        """`count_bytes` from `offset_bytes` on. UnreadableFile: the file ends or the disk fails."""
        parts: list[bytes] = []
        end_bytes = offset_bytes + count_bytes
        while True:  # one pass, except for reads beyond the 2 GiB at which the kernel stops
            try:
                part = os.pread(self._descriptor, end_bytes - offset_bytes, offset_bytes)
            except OSError as error:
                raise UnreadableFile(
                    f"{self.path}: bytes {offset_bytes:,} to {end_bytes:,} cannot be read "
                    f"({error.strerror}). Look at the disk or the network file system, then start "
                    "the same command again."
                ) from None
            if not parts and len(part) == count_bytes:
                return part
            if not part:
                raise UnreadableFile(
                    f"{self.path}: the file was cut short while it was in use. It ends at byte "
                    f"{self.size_bytes:,}, and bytes {offset_bytes:,} to {end_bytes:,} are needed. "
                    "Copy it again or make it again, then start the same command again."
                )
            parts.append(part)
            offset_bytes += len(part)
            if offset_bytes == end_bytes:
                return b"".join(parts)


class FileArray:
    """A read-only array in part of a file: `len`, a row, slices of rows, `np.asarray` for all.

    What is read is a copy, and cannot be written to. UnreadableFile, a ValueError, names the file
    when it no longer holds what it held.
    """

    def __init__(
        self,
        file: ReadOnlyFile,
        dtype: npt.DTypeLike,
        shape: int | tuple[int, ...],
        offset_bytes: int = 0,
    ):
        self.file = file
        self.dtype = np.dtype(dtype)
        self._offset_bytes = offset_bytes
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self._row_bytes = self.dtype.itemsize * prod(self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """One row, or the rows of a slice without a step."""
        if not isinstance(rows, slice):
            row = operator.index(rows)
            row = row + self.shape[0] if row < 0 else row
            return self._values(self._content(row, row + 1))[0]
        start, end, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"{self.file.path}: read by slices without a step, not [::{step}]")
        return self._values(self._content(start, max(start, end)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def read_pieces(self, pieces: Sequence[tuple[int, int]]) -> np.ndarray:
        """The rows [start, end) of every piece, back to back. IndexError outside the array."""
        return self._values(b"".join([self._content(start, end) for start, end in pieces]))

    def _content(self, start: int, end: int) -> bytes:
        if not 0 <= start <= end <= self.shape[0]:
            raise IndexError(f"{self.file.path}: rows {start} to {end} of {self.shape[0]}")
        return self.file.read(
            (end - start) * self._row_bytes, self._offset_bytes + start * self._row_bytes
        )

    def _values(self, content: bytes) -> np.ndarray:
        values = np.frombuffer(content, self.dtype)
        return values if len(self.shape) == 1 else values.reshape(-1, *self.shape[1:])


def open_array(path: str | Path, dtype: npt.DTypeLike) -> FileArray:
    """A file that holds nothing but values of `dtype`; its present size says how many."""
    file = ReadOnlyFile(path)
    return FileArray(file, dtype, file.size_bytes // np.dtype(dtype).itemsize)


def open_npy(path: str | Path) -> FileArray:
    """The array in a .npy file.

    ValueError names a file that is none, that holds Python objects or that ends too early.
    """
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, by_columns, dtype = read_header(stream)
            offset_bytes = stream.tell()
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a .npy file ({error})") from None
    if dtype.hasobject or not shape or (by_columns and len(shape) > 1):
        raise ValueError(
            f"{path}: dtype {dtype}, shape {shape}; expected an array of numbers, by rows"
        )
    file = ReadOnlyFile(path)
    expected_bytes = offset_bytes + dtype.itemsize * prod(shape)
    if file.size_bytes < expected_bytes:
        raise UnreadableFile(
            f"{path}: the file is truncated: {file.size_bytes} bytes, its header asks for "
            f"{expected_bytes}"
        )
    return FileArray(file, dtype, shape, offset_bytes)
