"""Segments that were encoded before, and where their tokens are kept.

Everything works on arrays, so that a batch of documents costs a few numpy calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

COUNT_BITS = np.int64(8)
_SLOT_BITS = 20
MOST_ENTRIES = (1 << _SLOT_BITS) * 5 // 8
"""How full a table may become; beyond this, probing takes too many steps."""
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)


class TokenStore:
    """Token sequences back to back.

    A sequence is named by one integer, its place: start << 8 | count.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.tokens = np.zeros(1 << 16, dtype)
        self._used = 0

    def add(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Keep the sequences; returns the place of each."""
        counts = np.fromiter(map(len, sequences), np.int64, len(sequences))
        total = int(counts.sum())
        if self._used + total > len(self.tokens):
            self.tokens = np.concatenate(
                [self.tokens, np.zeros(max(len(self.tokens), total), self.tokens.dtype)]
            )
        self.tokens[self._used : self._used + total] = np.fromiter(
            chain.from_iterable(sequences), self.tokens.dtype, total
        )
        starts = self._used + np.cumsum(counts) - counts
        self._used += total
        return starts << COUNT_BITS | counts


class SegmentTable:
    """A hash table from keys, rows of `columns` integers, to places in a TokenStore.

    Whole keys are compared, so no collision of hashes can give the tokens of another segment.
    """

    def __init__(self, columns: int) -> None:
        self._slots = 1 << _SLOT_BITS
        # A slot whose key is zero is free: texts hold no NUL, so no segment has that key.
        self._keys = np.zeros((self._slots, columns), "<u8")
        self._places = np.zeros(self._slots, np.int64)
        self.entries = 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key, -1 where it is absent."""
        slots = self._hash(keys)
        hit, free = self._compare(slots, keys)
        places = self._places[slots]
        places[~hit] = -1
        todo = np.flatnonzero(~(hit | free))
        while len(todo):
            # Linear probing: the keys whose slot holds another key look at the next slot.
            slots[todo] = (slots[todo] + 1) & (self._slots - 1)
            hit, free = self._compare(slots[todo], keys[todo])
            places[todo[hit]] = self._places[slots[todo[hit]]]
            todo = todo[~(hit | free)]
        return places

    def _compare(self, slots: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each slot holds its key, and whether it is free."""
        stored = self._keys[slots]
        free = stored[:, 0] == 0
        if stored.shape[1] == 1:
            return stored[:, 0] == keys[:, 0], free
        differs = stored ^ keys
        return (differs[:, 0] | differs[:, 1] | differs[:, 2] | differs[:, 3]) == 0, free

    def insert(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Add keys that are distinct and not yet there. The caller sees to MOST_ENTRIES."""
        slots = self._hash(keys)
        todo = np.arange(len(keys))
        while len(todo):
            free = todo[self._keys[slots[todo], 0] == 0]
            # Of several keys that want one slot, the first gets it.
            _, first = np.unique(slots[free], return_index=True)
            winners = free[first]
            self._keys[slots[winners]] = keys[winners]
            self._places[slots[winners]] = places[winners]
            todo = np.setdiff1d(todo, winners, assume_unique=True)
            slots[todo] = (slots[todo] + 1) & (self._slots - 1)
        self.entries += len(keys)

    @staticmethod
    def _hash(keys: np.ndarray) -> np.ndarray:
        mixed = keys[:, 0] * _MULTIPLIERS[0]
        for column in range(1, keys.shape[1]):
            mixed ^= (keys[:, column] + (mixed >> np.uint64(29))) * _MULTIPLIERS[column]
        mixed ^= mixed >> np.uint64(32)
        mixed *= _MULTIPLIERS[1]
        return (mixed >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
