"""Sample i of one corpus as token ranges, also after samples of another length or order were read:
nothing twice, nothing lost.

A corpus is read epoch after epoch (epoch_index.py). When the sequence length or the seed changes in
the middle of an epoch, the samples of that epoch that were not read are laid end to end in the
order of the epoch, cut again with the new length and put in random order; later epochs are cut with
the new length and seed. Fewer tokens than one sample are left over, as at the end of an epoch.

S = sequence length in tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_slm.data.epoch_index import (
    EpochIndex,
    build_once,
    cut_in_order,
    sample_order,
    samples_per_epoch,
    shuffled_epoch,
    whole_corpus,
)
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import CorpusIndex
from megatron_slm.data.position import Stretch


class Documents(NamedTuple):
    """Where the documents of a corpus lie in its .bin. A document is a sequence of the .idx."""

    pointers_bytes: np.ndarray | FileArray
    """int64 [documents]: where each begins."""
    lengths: np.ndarray | FileArray
    """int32 [documents], tokens."""
    itemsize: int
    tokens: int
    """In all."""

    @classmethod
    def of(cls, index: CorpusIndex) -> "Documents":
        return cls(
            index.sequence_offsets_bytes,
            index.sequence_lengths_tokens,
            index.dtype.itemsize,
            index.tokens,
        )

    def range_tokens(self, number: int) -> tuple[int, int]:
        """Absolute offsets [start, end) of one document."""
        pointers_bytes = self.pointers_bytes[number : number + 2].tolist()
        if len(pointers_bytes) == 1:
            return pointers_bytes[0] // self.itemsize, self.tokens
        return pointers_bytes[0] // self.itemsize, pointers_bytes[1] // self.itemsize


@dataclass(frozen=True)
class RestIndex:
    """The unread part of an epoch, cut again: like an EpochIndex whose documents are these ranges,
    in this order.
    """

    range_start: np.ndarray | FileArray
    """int64 [ranges]: absolute offset of its first token."""
    range_tokens: np.ndarray | FileArray
    """int32 [ranges]."""
    sample_index: np.ndarray | FileArray
    shuffle_index: np.ndarray | FileArray


@dataclass(frozen=True)
class Place:
    """Where a sample is found: the epoch, its index, and the position in the order of samples."""

    epoch: int
    index: EpochIndex | RestIndex
    within: int


class CorpusOrder:
    """`pieces(i)` of sample i, counted from the end of `past`; shuffle=False: every token once, in
    an order that no seed changes.

    cache: folder that keeps the arrays, of this corpus alone; None keeps them in memory.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = True,
        past: Sequence[Stretch] = (),
        cache: Path | None = None,
    ):
        self.documents = documents
        self.cache = cache
        self.shuffle = shuffle
        self.sequence_length = sequence_length
        self.seed = seed
        self.epochs: dict[int, EpochIndex] = {}
        self.first_epoch = 0
        self.first_sample = 0
        self.rest: RestIndex | None = None
        self.samples_per_epoch = samples_per_epoch(documents.tokens, sequence_length)
        if not shuffle:
            self.samples_per_epoch = len(self.epoch(0).shuffle_index)
        if past and (past[-1].sequence_length, past[-1].seed) == (sequence_length, seed):
            self.first_sample = past[-1].samples
            past = past[:-1]
        if past:
            self._continue_after(tuple(past))

    def _continue_after(self, past: tuple[Stretch, ...]) -> None:
        """Begin with what `past`, whose last stretch was of another length or seed, has left of its
        epoch.
        """
        last = past[-1]
        before = CorpusOrder(
            self.documents,
            sequence_length=last.sequence_length,
            seed=last.seed,
            past=past,
            cache=self.cache,
        )
        place = before.place(0)
        self.first_epoch = place.epoch
        if place.within == 0 and isinstance(place.index, EpochIndex):
            return  # nothing of this epoch was read
        self.first_epoch += 1
        key = sha256(repr(past).encode()).hexdigest()[:16]
        name = f"sequence_{self.sequence_length}-seed_{self.seed}-after_{key}"
        build = partial(
            rest_of_epoch,
            self.documents,
            place,
            self.sequence_length,
            [self.seed, place.epoch, len(past)],
        )
        rest = build_once(self.cache / name if self.cache else None, RestIndex, build)
        if len(rest.shuffle_index):
            self.rest = rest

    def place(self, index: int) -> Place:
        """Where sample `index` is."""
        index += self.first_sample
        if self.rest is not None:
            rest_samples = len(self.rest.shuffle_index)
            if index < rest_samples:
                return Place(self.first_epoch - 1, self.rest, index)
            index -= rest_samples
        number, within = divmod(index, self.samples_per_epoch)
        return Place(self.first_epoch + number, self.epoch(self.first_epoch + number), within)

    def epoch(self, number: int) -> EpochIndex:
        """The index of an epoch. Threads may ask at once: the one that reads ahead, and one that
        reads a step again.
        """
        index = self.epochs.get(number)
        if index is None:
            lengths = self.documents.lengths
            tokens = self.documents.tokens
            build: Callable[[], EpochIndex]
            if self.shuffle:
                name = f"sequence_{self.sequence_length}-seed_{self.seed}-epoch_{number:05d}"
                build = partial(
                    shuffled_epoch, lengths, tokens, self.sequence_length, self.seed, number
                )
            else:
                number = 0
                name = f"sequence_{self.sequence_length}-whole"
                build = partial(whole_corpus, lengths, tokens, self.sequence_length)
            # Samples come in order: of the epochs before, only the last one may be needed again.
            kept = {n: each for n, each in self.epochs.items() if n == number - 1}
            self.epochs = kept
            index = build_once(self.cache / name if self.cache else None, EpochIndex, build)
            self.epochs = kept | {number: index}
        return index

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """Absolute token ranges [start, end) of sample `index`, one per document it touches; S + 1
        tokens in all.
        """
        place = self.place(index)
        row = int(place.index.shuffle_index[place.within])
        return ranges_of_sample(self.documents, place.index, row)


def ranges_of_sample(
    documents: Documents, index: EpochIndex | RestIndex, row: int
) -> list[tuple[int, int]]:
    """Absolute [start, end) of the tokens of one sample, one range per document, empty ones too.

    The same walk as GPTDataset._query_document_sample_shuffle_indices (a test compares the tokens),
    by offset; and the same as `token_ranges` of one row (a test compares the two), for one sample
    several times faster.
    """
    (begin, begin_offset), (end, end_offset) = index.sample_index[row : row + 2].tolist()
    if isinstance(index, RestIndex):
        starts = index.range_start[begin : end + 1].tolist()
        lengths = index.range_tokens[begin : end + 1].tolist()
        ranges = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    else:
        numbers = index.document_index[begin : end + 1].tolist()
        ranges = [documents.range_tokens(number) for number in numbers]
    ranges[-1] = (ranges[-1][0], ranges[-1][0] + end_offset + 1)
    ranges[0] = (ranges[0][0] + begin_offset, ranges[0][1])
    return ranges


def token_ranges(
    documents: Documents, index: EpochIndex | RestIndex, first_R: np.ndarray, last_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Absolute starts and ends, int64, of the tokens of R runs of neighbouring samples, from row
    first_R to row last_R inclusive.

    One range per document and run, empty ones too. Holds the arrays that it looks into in memory.
    """
    begin_R, begin_offset_R = index.sample_index[:][first_R].astype(np.int64).T
    end_R, end_offset_R = index.sample_index[:][last_R + 1].astype(np.int64).T
    count_R = end_R - begin_R + 1
    final_R = np.cumsum(count_R) - 1
    initial_R = final_R - count_R + 1
    position = np.repeat(begin_R - initial_R, count_R) + np.arange(count_R.sum())
    if isinstance(index, RestIndex):
        starts = index.range_start[:][position]
        lengths = index.range_tokens[:][position]
    else:
        numbers = index.document_index[:][position]
        starts = documents.pointers_bytes[:][numbers] // documents.itemsize
        lengths = documents.lengths[:][numbers]
    starts = np.array(starts, np.int64)
    ends = starts + lengths
    ends[final_R] = starts[final_R] + end_offset_R + 1  # a sample's last token opens the next one
    starts[initial_R] += begin_offset_R
    return starts, ends


def rest_of_epoch(
    documents: Documents, place: Place, sequence_length: int, entropy: list[int]
) -> RestIndex:
    """The samples from `place` to the end of its epoch, neighbours joined, cut every
    `sequence_length` tokens.
    """
    rows = np.sort(place.index.shuffle_index[place.within :]).astype(np.int64)
    breaks = np.flatnonzero(np.diff(rows) != 1)
    first_R = rows[np.append(0, breaks + 1)]
    last_R = rows[np.append(breaks, len(rows) - 1)]
    starts, ends = token_ranges(documents, place.index, first_R, last_R)
    has_tokens = ends > starts
    starts = starts[has_tokens]
    ends = ends[has_tokens]
    lengths = (ends - starts).astype(np.int32)
    sample_index = cut_in_order(
        lengths, np.arange(len(lengths), dtype=np.int32), int(lengths.sum()), sequence_length
    )
    return RestIndex(starts, lengths, sample_index, sample_order(len(sample_index) - 1, entropy))
