"""Which tokens make up sample i of epoch e of one corpus: megatron-core's three index arrays, built
for one epoch at a time.

As in GPTDataset, documents are put in random order, laid end to end and cut every S tokens (a
sample reads S + 1, so its last token is the first input of the next one); the samples are then put
in random order. GPTDataset shuffles all epochs together for a given number of samples, so the same
seed with a longer run gives another order from sample 0 on. Here every epoch is built by itself,
from (seed, epoch) alone, so a longer run continues a shorter one.

What is left of an epoch after its last whole sample is not used: fewer than S tokens, of other
documents every time.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from megatron_slm.data.file_array import FileArray, open_npy

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Arrays = TypeVar("Arrays", bound="DataclassInstance")
DOCUMENTS_AT_ONCE = 1 << 20
"""Documents whose ends are computed together: 24 MiB of int64 beside the arrays of the epoch."""


@dataclass(frozen=True)
class EpochIndex:
    """The arrays of one epoch, in GPTDataset's meaning."""

    document_index: np.ndarray | FileArray
    """int32 [documents]: order in which the documents are laid end to end."""
    sample_index: np.ndarray | FileArray
    """int32 or int64 [samples + 1, 2]: where a sample begins, as a position in document_index and a
    token offset in that document.
    """
    shuffle_index: np.ndarray | FileArray
    """uint32 or int64 [samples]: order in which the samples are read."""


def samples_per_epoch(tokens: int, sequence_length: int) -> int:
    return max(0, tokens - 1) // sequence_length


def shuffled_epoch(
    lengths: np.ndarray | FileArray, tokens: int, sequence_length: int, seed: int, epoch: int
) -> EpochIndex:
    """Epoch `epoch` of a corpus whose documents have `lengths` (int32, tokens).

    It depends on the arguments alone.
    """
    random = _random([seed, epoch])
    document_index = np.arange(len(lengths), dtype=np.int32)
    random.shuffle(document_index)
    sample_index = cut_in_order(lengths, document_index, tokens, sequence_length)
    shuffle_index = _numbers(len(sample_index) - 1)
    random.shuffle(shuffle_index)
    return EpochIndex(document_index, sample_index, shuffle_index)


def cut_in_order(
    lengths: np.ndarray | FileArray, document_index: np.ndarray, tokens: int, sequence_length: int
) -> np.ndarray:
    """Where each sample begins (EpochIndex.sample_index) when documents of `tokens` tokens in all
    are laid end to end in this order.

    Equals megatron-core's compiled helpers.build_sample_idx (a test compares the two), and needs
    numpy alone. Sample i begins at token i * sequence_length of the row of documents: in the
    document that holds this token, except that sample 0 begins with the first document, be it
    empty.
    """
    if tokens <= sequence_length:
        return np.zeros((1, 2), np.int32)
    lengths = np.array(lengths)
    samples = samples_per_epoch(tokens, sequence_length)
    largest = max(len(document_index), int(lengths.max()))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    sample_index = np.zeros((samples + 1, 2), dtype)
    begun = 1
    tokens_before = 0
    for first in range(0, len(document_index), DOCUMENTS_AT_ONCE):
        piece = document_index[first : first + DOCUMENTS_AT_ONCE]
        ends = tokens_before + np.cumsum(lengths[piece], dtype=np.int64)
        last = min(samples, (int(ends[-1]) - 1) // sequence_length)
        starts = np.arange(begun, last + 1, dtype=np.int64) * sequence_length
        within = np.searchsorted(ends, starts, side="right")
        sample_index[begun : last + 1, 0] = first + within
        sample_index[begun : last + 1, 1] = starts - (ends[within] - lengths[piece[within]])
        begun = max(begun, last + 1)
        tokens_before = int(ends[-1])
    return sample_index


def sample_order(samples: int, entropy: list[int]) -> np.ndarray:
    """The numbers of `samples` samples in an order that depends on `entropy` alone."""
    order = _numbers(samples)
    _random(entropy).shuffle(order)
    return order


def _random(entropy: list[int]) -> np.random.RandomState:
    # RandomState, not Generator: numpy promises never to change the streams of RandomState, and a
    # resumed run may meet a newer numpy.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(entropy)))


def whole_corpus(lengths: np.ndarray | FileArray, tokens: int, sequence_length: int) -> EpochIndex:
    """Every token once as a label: documents in file order, the last sample shorter than S.

    The samples come in a fixed random order, so that the first n of them represent the whole of a
    corpus that is sorted by source.
    """
    document_index = np.arange(len(lengths), dtype=np.int32)
    sample_index = cut_in_order(lengths, document_index, tokens, sequence_length)
    if (tokens - 1) % sequence_length:
        sample_index = np.append(
            sample_index,
            np.array([[len(lengths) - 1, lengths[-1] - 1]], sample_index.dtype),
            axis=0,
        )
    shuffle_index = _numbers(len(sample_index) - 1)
    np.random.RandomState(0).shuffle(shuffle_index)
    return EpochIndex(document_index, sample_index, shuffle_index)


def _numbers(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.uint32 if samples < 2**32 - 1 else np.int64)


def build_once(folder: Path | None, kind: type[Arrays], build: Callable[[], Arrays]) -> Arrays:
    """`build()`, kept in `folder` as one .npy per field of the dataclass `kind`, and read from
    there whenever the folder exists.

    The first process on a file system builds while the others wait for its lock. The folder is
    renamed into place whole, so a killed build leaves nothing that could be read. Machines without
    a shared file system each build their own: the arrays are a pure function of what the folder's
    name says. folder=None, or a folder that cannot be written, keeps them in memory. ValueError
    names a file of the folder that is damaged.
    """
    if folder is None:
        return build()
    if not folder.exists():
        with _lock_of(folder) as may_write:
            if not may_write:
                return build()
            if not folder.exists():
                _save(folder, build())
    try:
        return kind(**{f.name: open_npy(folder / f"{f.name}.npy") for f in fields(kind)})
    except ValueError as error:
        raise ValueError(f"{error}. Delete the folder {folder}; it is built again.") from None


@contextlib.contextmanager
def _lock_of(folder: Path) -> Iterator[bool]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115  closed below
    except OSError:
        yield False
        return
    with stream:
        # On a file system without locks, several processes build the same arrays: only time is
        # lost.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield True


def _save(folder: Path, arrays: "DataclassInstance") -> None:
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        for f in fields(arrays):
            with open(temporary / f"{f.name}.npy", "wb") as stream:
                np.save(stream, getattr(arrays, f.name))
                stream.flush()
                os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError, OSError):  # another machine was first
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not folder.exists():
        raise OSError(f"{folder} could not be written; give data.index_cache a folder that can.")
