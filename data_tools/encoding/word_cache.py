"""The exact word cache: texts are cut into segments, and each distinct segment is encoded once.

Texts are cut only where the vocabulary proves that cutting does not change the tokens
(segments.py). Words repeat: most segments of a text were encoded before, and looking up their
tokens costs far less than merging them again. A batch of documents is worked on at once in numpy:
cut (a table of pairs of classes), pack each segment of up to 32 bytes into four integers, look
these up in a hash table (segment_table.py), and copy the tokens out. Segments that are new or
longer go to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data_tools.encoding.segment_table import (
    COUNT_BITS,
    MOST_ENTRIES,
    SegmentTable,
    TokenStore,
)
from data_tools.encoding.segments import SPACE_SIGN, CutRules, class_of_byte
from megatron_slm.tokenization import Tokenizer

_SHORT_BYTES = 8
_KEY_BYTES = 32
_MOST_LONG_ENTRIES = 50_000
_LONGEST_KEPT_BYTES = 256
_BATCH_BYTES = 1 << 18
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)


class CachedEncoder:
    """Equals `Tokenizer.encode` on every text, as little-endian bytes.

    Its memory is bounded: a full table is forgotten and begun again.
    """

    def __init__(self, tokenizer: Tokenizer, rules: CutRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
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
        self._short = SegmentTable(1)
        self._medium = SegmentTable(4)
        self._long: dict[bytes, np.ndarray] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Tokens of each text.

        Long texts are worked on in parts, so that only the result grows with them.
        """
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
                    parts = []
                    owners = []
                    waiting_bytes = 0
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
        """Tokens of a part of a text that begins and ends where cutting is exact.

        The caller has put `prefix` before the first part of the text.
        """
        return b"".join(self._encode_parts([part])[0] for part in self.parts_of(content))

    def last_cut(self, content: bytes) -> int:
        """The last place where the beginning of a longer text may be cut; 0 when there is none."""
        end = content.rfind(b"\n")
        if end > 0:
            return end
        cuts = self._cuts(content)
        return int(cuts[-1]) if len(cuts) else 0

    def parts_of(self, content: bytes) -> list[bytes]:
        """A text in parts of about a batch, each ending where cutting is exact."""
        parts = []
        start = 0
        window = _BATCH_BYTES
        while len(content) - start > window:
            end = content.rfind(b"\n", start + 1, start + window)
            if end < 0:
                cuts = self._cuts(content[start : start + window])
                if not len(cuts):
                    window *= 2  # no place to cut so far
                    continue
                end = start + int(cuts[-1])
            parts.append(content[start:end])
            start = end
            window = _BATCH_BYTES
        parts.append(content[start:])
        return parts

    def _cuts(self, content: bytes) -> np.ndarray:
        """Places (from 1) before which a cut is exact."""
        classes = np.frombuffer(content.translate(self._class_table), np.uint8)
        pairs = classes[:-1] << 3
        pairs |= classes[1:]
        return np.flatnonzero(np.frombuffer(pairs.tobytes().translate(self._cut_table), bool)) + 1

    def _encode_parts(self, parts: list[bytes]) -> list[bytes]:
        # A newline may always be cut off, so the one between two parts is a segment of its own.
        joined = b"\n".join(parts) + b"\n" + bytes(_KEY_BYTES)
        size = len(joined) - _KEY_BYTES
        starts = np.concatenate([np.zeros(1, np.int64), self._cuts(joined[:size])])
        lengths = np.diff(starts, append=size)
        places = self._places(joined, starts, lengths)
        firsts = places >> COUNT_BITS
        counts = places & ((1 << COUNT_BITS) - 1)
        long = self._long_segments(joined, starts, lengths)
        for segment, tokens in long:
            counts[segment] = len(tokens)
        separators = np.searchsorted(starts, np.cumsum([len(part) + 1 for part in parts]) - 1)
        counts[separators] = 0
        ends = np.cumsum(counts)
        sources = np.repeat(firsts - (ends - counts), counts)
        sources += np.arange(len(sources))
        # Where a long segment goes, the place means nothing; the clipped value is overwritten.
        tokens = self._store.tokens.take(sources, mode="clip")
        for segment, sequence in long:
            tokens[ends[segment] - len(sequence) : ends[segment]] = sequence
        content = tokens.tobytes()
        bounds = (ends[separators] * self._dtype.itemsize).tolist()
        return [content[start:end] for start, end in pairwise([0, *bounds])]

    def _places(self, joined: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The place of the tokens of every segment of at most 32 bytes; 0 for longer segments.

        New segments are encoded and remembered.
        """
        # windows[i]: the 8 bytes from i on, as one integer.
        windows = np.ndarray((len(joined) - 7,), "<u8", buffer=joined, strides=(1,))
        places = np.zeros(len(starts), np.int64)
        is_short = lengths <= _SHORT_BYTES
        for table, chosen in (
            (self._short, np.flatnonzero(is_short)),
            (self._medium, np.flatnonzero(~is_short & (lengths <= _KEY_BYTES))),
        ):
            columns = 1 if table is self._short else 4
            keys = self._keys(windows, starts[chosen], lengths[chosen], columns)
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
                if table.entries + len(new) > MOST_ENTRIES:
                    self._forget()
                    return self._places(joined, starts, lengths)
                new_keys = keys[np.fromiter(new.values(), np.int64, len(new))]
                table.insert(new_keys, self._store.add(self._encode_segments(list(new))))
                found[missing] = table.find(keys[missing])
            places[chosen] = found
        return places

    @staticmethod
    def _keys(
        windows: np.ndarray, starts: np.ndarray, lengths: np.ndarray, columns: int
    ) -> np.ndarray:
        """The bytes of each segment as `columns` integers, filled up with zeros."""
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
        """(position among the segments, tokens) of each segment that is longer than a key."""
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
        # One thread, because the worker processes are the parallelism; and one call for all
        # segments, because every call with a list starts a thread.
        return self._rules.inner.encode(
            [segment.decode("utf-8") for segment in segments], num_threads=1
        )
