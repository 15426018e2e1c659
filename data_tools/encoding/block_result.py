"""The result of a worker for a block, and how it is assembled document by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from data_tools.reading.blocks import Record
from data_tools.reading.documents import BadRecord, Reject
from data_tools.reading.giant import GiantText

SAMPLES_PER_REASON = 100
"""Rejects of one reason that a block lists; the others are only counted."""


@dataclass
class Part:
    """Consecutive documents: their tokens in memory, or those of one giant document in a file."""

    documents: int
    tokens: bytes = b""
    spill: str = ""
    """Path of the file with a giant document's tokens."""


@dataclass
class BlockResult:
    """What a worker hands back for a block."""

    number: int
    parts: list[Part] = field(default_factory=list)
    lengths_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Of each kept document, the tokens that begin and close it included."""
    text_bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """UTF-8 size of each kept document."""
    records: int = 0
    lines: int = 0
    read_bytes: int = 0
    damaged_bytes: int = 0
    digest: bytes = b""
    rejects: Counter = field(default_factory=Counter)
    filtered: Counter = field(default_factory=Counter)
    reject_samples: list[Reject] = field(default_factory=list)
    hashes: bytes = b""
    """HASH_BYTES per kept document when duplicates are to be dropped; else empty."""


class GrowingResult:
    """A block's result while documents are added to it."""

    def __init__(self, result: BlockResult) -> None:
        self.result = result
        self._contents: list[bytes] = []
        """Tokens of the documents that are in no part yet."""
        self._documents_in_parts = 0
        self._lengths_tokens: list[int] = []
        self._text_bytes: list[int] = []
        self._hashes: list[bytes] = []

    def add(
        self, contents: Iterable[bytes], length_tokens: int, size_bytes: int, digest: bytes
    ) -> None:
        """Add a document whose tokens are `contents`, joined."""
        self._contents += contents
        self._count(length_tokens, size_bytes, digest)

    def add_spill(self, path: str, length_tokens: int, size_bytes: int, digest: bytes) -> None:
        """Add a giant document whose tokens are in the file `path`."""
        self._close_part()
        self._count(length_tokens, size_bytes, digest)
        self.result.parts.append(Part(1, spill=path))
        self._documents_in_parts += 1

    def reject(self, reject: Reject) -> None:
        self.result.rejects[reject.reason] += 1
        if self.result.rejects[reject.reason] <= SAMPLES_PER_REASON:
            self.result.reject_samples.append(reject)

    def finish(
        self, *, lines: int, read_bytes: int, damaged_bytes: int, digest: bytes
    ) -> BlockResult:
        """The result with all documents, and with the reader's facts about the block."""
        self._close_part()
        result = self.result
        result.lengths_tokens = np.array(self._lengths_tokens, dtype=np.int32)
        result.text_bytes = np.array(self._text_bytes, dtype=np.int64)
        result.hashes = b"".join(self._hashes)
        result.lines = lines
        result.read_bytes = read_bytes
        result.damaged_bytes = damaged_bytes
        result.digest = digest
        return result

    def _count(self, length_tokens: int, size_bytes: int, digest: bytes) -> None:
        self._lengths_tokens.append(length_tokens)
        self._text_bytes.append(size_bytes)
        self._hashes.append(digest)

    def _close_part(self) -> None:
        documents = len(self._lengths_tokens) - self._documents_in_parts
        if documents:
            self.result.parts.append(Part(documents, b"".join(self._contents)))
            self._contents = []
            self._documents_in_parts += documents


def reject_of(record: Record | GiantText, bad: BadRecord) -> Reject:
    return Reject(record.path, record.line, bad.reason, bad.detail)
