"""The first of documents with the same text stays in a corpus; the later ones are dropped."""

from __future__ import annotations

import os

import numpy as np

from data_tools.encoding.block_result import BlockResult, Part
from data_tools.reading.documents import HASH_BYTES


class DuplicateFilter:
    """Remembers the hash of every document: about 100 bytes of memory each."""

    def __init__(self, saved_hashes: bytes, token_bytes: int) -> None:
        """saved_hashes: of the documents that an interrupted run has written already."""
        self._known = set(_hashes(saved_hashes))
        self._token_bytes = token_bytes

    def drop_from(self, result: BlockResult) -> int:
        """Take documents whose text is known out of `result`; returns how many.

        Files with the tokens of giant duplicates are removed.
        """
        end_tokens = np.cumsum(result.lengths_tokens, dtype=np.int64)
        ends = (end_tokens * self._token_bytes).tolist()
        starts = [0, *ends[:-1]]
        hashes = _hashes(result.hashes)
        kept: list[int] = []
        parts: list[Part] = []
        first = 0
        for part in result.parts:
            fresh = self._take_unknown(hashes, range(first, first + part.documents))
            if part.spill and not fresh:
                os.unlink(part.spill)
            elif fresh:
                base = starts[first]
                contents = [part.tokens[starts[i] - base : ends[i] - base] for i in fresh]
                parts.append(Part(len(fresh), b"".join(contents), part.spill))
            kept += fresh
            first += part.documents
        result.parts = parts
        result.lengths_tokens = result.lengths_tokens[kept]
        result.text_bytes = result.text_bytes[kept]
        result.hashes = b"".join(hashes[number] for number in kept)
        return len(hashes) - len(kept)

    def _take_unknown(self, hashes: list[bytes], numbers: range) -> list[int]:
        """The documents among `numbers` whose hash was not known before; it is from now on."""
        unknown = []
        for number in numbers:
            if hashes[number] not in self._known:
                self._known.add(hashes[number])
                unknown.append(number)
        return unknown


def _hashes(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]
