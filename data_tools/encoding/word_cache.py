"""The exact word cache: texts are cut where the vocabulary proves it harmless, and each distinct segment is encoded once.

Words repeat: most segments of a text were seen before, and finding their tokens again costs far less than merging them again.
All of it is done for a batch of documents at once in numpy: cut (a table of class pairs), pack each segment of up to 32 bytes
into four integers, look these up in a hash table that compares all 32 bytes (so no collision can give wrong tokens), and copy
the tokens out. Segments that are new or longer go to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from data_tools.encoding.segments import SPACE_SIGN, CutRules, class_of_byte
from megatron_slm.tokenization import Tokenizer

_SHORT_BYTES = 8
_KEY_BYTES = 32
_SLOT_BITS = 20
_MOST_ENTRIES = (1 << _SLOT_BITS) * 5 // 8
_MOST_LONG_ENTRIES = 50_000
_LONGEST_KEPT_BYTES = 256
_BATCH_BYTES = 1 << 18
_COUNT_BITS = np.int64(8)
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)


class TokenStore:
    """Token sequences back to back; a sequence is named by one integer, its place: start << 8 | count."""

    def __init__(self, dtype: np.dtype) -> None:
        self.tokens = np.zeros(1 << 16, dtype)
        self._used = 0

    def add(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
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
        return starts << _COUNT_BITS | counts


class SegmentTable:
    """Hash table from keys of `columns` integers (N x columns) to places; lookups and insertions work on arrays."""

    def __init__(self, columns: int) -> None:
        self._slots = 1 << _SLOT_BITS
        self._keys = np.zeros(
            (self._slots, columns), "<u8"
        )  # an all-zero key is a free slot: texts hold no NUL
        self._places = np.zeros(self._slots, np.int64)
        self.entries = 0

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key, -1 where it is absent."""
        slots = self._hash(keys)
        hit, free = self._compare(slots, keys)
        places = self._places[slots]
        places[~hit] = -1
        todo = np.flatnonzero(~(hit | free))
        while len(todo):  # linear probing, on ever fewer keys
            slots[todo] = (slots[todo] + 1) & (self._slots - 1)
            hit, free = self._compare(slots[todo], keys[todo])
            places[todo[hit]] = self._places[slots[todo[hit]]]
            todo = todo[~(hit | free)]
        return places

    def _compare(self, slots: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._keys[slots]
        if found.shape[1] == 1:
            return found[:, 0] == keys[:, 0], found[:, 0] == 0
        differs = found ^ keys
        return (differs[:, 0] | differs[:, 1] | differs[:, 2] | differs[:, 3]) == 0, found[
            :, 0
        ] == 0

    def insert(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Add distinct absent keys. The caller keeps room."""
        slots, todo = self._hash(keys), np.arange(len(keys))
        while len(todo):
            free = todo[self._keys[slots[todo], 0] == 0]
            _, first = np.unique(
                slots[free], return_index=True
            )  # of several keys for one slot, the first gets it
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


class CachedEncoder:
    """Equals `Tokenizer.encode` on every text, as little-endian bytes; memory is bounded by the table's size."""

    def __init__(self, tokenizer: Tokenizer, rules: CutRules) -> None:
        self._tokenizer, self._rules = tokenizer, rules
        self._dtype = tokenizer.token_dtype.newbyteorder("<")
        self._class_table = class_of_byte().tobytes()
        cut_of_pair = np.zeros(256, bool)
        cut_of_pair[:64].reshape(8, 8)[:6, :6] = rules.may_cut
        self._cut_table = cut_of_pair.tobytes()
        self._forget()

        self.prefix = b" " if rules.dummy_prefix else b""
        """What the tokenizer puts before a text."""
        self.forbidden = rules.forbidden

    def _forget(self) -> None:
        self._store = TokenStore(self._dtype)
        self._short, self._medium = SegmentTable(1), SegmentTable(4)
        self._long: dict[bytes, np.ndarray] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Tokens of each text. Long texts are worked on in parts, so the memory beyond the result does not grow with them."""
        parts: list[bytes] = []
        owners: list[int] = []
        results: list[list[bytes]] = [[] for _ in texts]
        waiting_bytes = 0
        for number, text in enumerate(texts):
            if self.must_stay_whole(text):
                results[number].append(self._encode_whole(text))
                continue
            for part in self.parts_of(self.prefix + self.as_bytes(text)):
                parts.append(part)
                owners.append(number)
                waiting_bytes += len(part)
                if waiting_bytes >= _BATCH_BYTES:
                    self._encode_into(results, owners, parts)
                    parts, owners, waiting_bytes = [], [], 0
        self._encode_into(results, owners, parts)
        return [pieces[0] if len(pieces) == 1 else b"".join(pieces) for pieces in results]

    @staticmethod
    def as_bytes(text: str) -> bytes:
        """UTF-8 of the text as the model sees it."""
        return text.replace(SPACE_SIGN, " ").encode("utf-8")

    def must_stay_whole(self, text: str) -> bool:
        return any(mark in text for mark in self._rules.forbidden)

    def _encode_whole(self, text: str) -> bytes:
        return np.asarray(self._tokenizer.encode(text)).astype(self._dtype).tobytes()

    def _encode_into(
        self, results: list[list[bytes]], owners: list[int], parts: list[bytes]
    ) -> None:
        for owner, content in zip(owners, self._encode_parts(parts) if parts else (), strict=True):
            results[owner].append(content)

    def encode_part(self, content: bytes) -> bytes:
        """Tokens of a part of a text that begins and ends where cutting is exact (`prefix` already before the first)."""
        return b"".join(self._encode_parts([part])[0] for part in self.parts_of(content))

    def last_cut(self, content: bytes) -> int:
        """The last place where this beginning of a longer text may be cut, 0 where there is none."""
        end = content.rfind(b"\n")
        if end > 0:
            return end
        cuts = self._cuts(content)
        return int(cuts[-1]) if len(cuts) else 0

    def parts_of(self, content: bytes) -> list[bytes]:
        """A text in parts of about a batch, each ending where cutting is exact."""
        parts, start, window = [], 0, _BATCH_BYTES
        while len(content) - start > window:
            end = content.rfind(b"\n", start + 1, start + window)
            if end < 0:
                cuts = self._cuts(content[start : start + window])
                if not len(cuts):
                    window *= 2  # nothing to cut at so far
                    continue
                end = start + int(cuts[-1])
            parts.append(content[start:end])
            start, window = end, _BATCH_BYTES
        parts.append(content[start:])
        return parts

    def _cuts(self, content: bytes) -> np.ndarray:
        """Places (from 1) before which a cut is exact."""
        classes = np.frombuffer(content.translate(self._class_table), np.uint8)
        pairs = classes[:-1] << 3
        pairs |= classes[1:]
        return np.flatnonzero(np.frombuffer(pairs.tobytes().translate(self._cut_table), bool)) + 1

    def _encode_parts(self, parts: list[bytes]) -> list[bytes]:
        joined = (
            b"\n".join(parts) + b"\n" + bytes(_KEY_BYTES)
        )  # a newline between parts is a segment of its own
        size = len(joined) - _KEY_BYTES
        starts = np.concatenate([np.zeros(1, np.int64), self._cuts(joined[:size])])
        lengths = np.diff(starts, append=size)
        places = self._places(joined, starts, lengths)
        firsts, counts = places >> _COUNT_BITS, places & ((1 << _COUNT_BITS) - 1)
        long = self._long_segments(joined, starts, lengths)
        for segment, tokens in long:
            counts[segment] = len(tokens)
        separators = np.searchsorted(starts, np.cumsum([len(part) + 1 for part in parts]) - 1)
        counts[separators] = 0
        ends = np.cumsum(counts)
        sources = np.repeat(firsts - (ends - counts), counts)
        sources += np.arange(len(sources))
        tokens = self._store.tokens.take(
            sources, mode="clip"
        )  # where a long segment goes, the place means nothing
        for segment, sequence in long:
            tokens[ends[segment] - len(sequence) : ends[segment]] = sequence
        content = tokens.tobytes()
        bounds = (ends[separators] * self._dtype.itemsize).tolist()
        return [content[start:end] for start, end in pairwise([0, *bounds])]

    def _places(self, joined: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Where the tokens of every segment of at most 32 bytes lie, new ones encoded and remembered; 0 for longer ones."""
        windows = np.ndarray(
            (len(joined) - 7,), "<u8", buffer=joined, strides=(1,)
        )  # the 8 bytes from every place
        places = np.zeros(len(starts), np.int64)
        is_short = lengths <= _SHORT_BYTES
        for table, chosen in (
            (self._short, np.flatnonzero(is_short)),
            (self._medium, np.flatnonzero(~is_short & (lengths <= _KEY_BYTES))),
        ):
            keys = self._keys(
                windows, starts[chosen], lengths[chosen], 1 if table is self._short else 4
            )
            found = table.find(keys)
            missing = np.flatnonzero(found < 0)
            if len(missing):
                new = {
                    joined[start : start + length]: place
                    for start, length, place in zip(
                        starts[chosen[missing]].tolist(),
                        lengths[chosen[missing]].tolist(),
                        missing.tolist(),
                        strict=True,
                    )
                }
                if table.entries + len(new) > _MOST_ENTRIES:
                    self._forget()
                    return self._places(joined, starts, lengths)
                new_keys = keys[np.fromiter(new.values(), np.int64, len(new))]
                table.insert(new_keys, self._store.add(self._encode_segments(list(new))))
                found[missing] = table.find(keys[missing])
            places[chosen] = found
        return places

    def _keys(
        self, windows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, columns: int
    ) -> np.ndarray:
        keys = np.zeros((len(starts), columns), "<u8")
        keys[:, 0] = windows[starts] & _MASKS[np.minimum(lengths, 8)]
        for column in range(1, columns):
            longer = np.flatnonzero(lengths > 8 * column)
            keys[longer, column] = (
                windows[starts[longer] + 8 * column]
                & _MASKS[np.minimum(lengths[longer] - 8 * column, 8)]
            )
        return keys

    def _long_segments(
        self, joined: bytes, starts: np.ndarray, lengths: np.ndarray
    ) -> list[tuple[int, np.ndarray]]:
        places = np.flatnonzero(lengths > _KEY_BYTES).tolist()
        segments = [joined[starts[place] : starts[place] + lengths[place]] for place in places]
        known = {segment: self._long[segment] for segment in segments if segment in self._long}
        new = [segment for segment in dict.fromkeys(segments) if segment not in known]
        if new:
            known.update(
                zip(
                    new,
                    (np.array(ids, self._dtype) for ids in self._encode_segments(new)),
                    strict=True,
                )
            )
            if len(self._long) + len(new) > _MOST_LONG_ENTRIES:
                self._long.clear()
            self._long.update(
                (segment, known[segment])
                for segment in new[:_MOST_LONG_ENTRIES]
                if len(segment) <= _LONGEST_KEPT_BYTES
            )
        return [(place, known[segment]) for place, segment in zip(places, segments, strict=True)]

    def _encode_segments(self, segments: list[bytes]) -> list[list[int]]:
        # One thread: the processes are the parallelism. One call for a list: each call with a list starts a thread anew.
        return self._rules.inner.encode(
            [segment.decode("utf-8") for segment in segments], num_threads=1
        )
