"""What a worker does with a block: read its records, filter, encode, and hand back bytes and counts."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.encoding.encoders import Encoder, build_encoder
from data_tools.encoding.filters import Filters, FilterSettings
from data_tools.encoding.giant_encoding import encode_giant
from data_tools.encoding.word_cache import CachedEncoder
from data_tools.reading.blocks import Block, BlockReader, Record
from data_tools.reading.documents import DAMAGED_FILE, BadRecord, Reject, text_bytes
from data_tools.reading.giant import GiantText, scan
from megatron_slm.data.indexed import MAX_SEQUENCE_TOKENS
from megatron_slm.tokenization import Tokenizer

_BATCH_CHARACTERS = 1 << 18
SAMPLES_PER_REASON = 100


@dataclass(frozen=True)
class EncodeSettings:
    """Everything that decides the bytes of a block. Part of the identity of a run."""

    keys: tuple[str, ...]
    separator: str
    append_eod: bool
    prepend_bos: bool
    filters: FilterSettings


@dataclass
class Part:
    """Documents in a row: their tokens in memory, or of one giant document in a file."""

    documents: int
    tokens: bytes = b""
    spill: str = ""


@dataclass
class BlockResult:
    number: int
    parts: list[Part] = field(default_factory=list)
    lengths_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """One per kept document, the closing token included."""
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
    """16 bytes per kept document when duplicates are to be dropped."""


class BlockEncoder:
    """The state of one worker: reader, filters and encoder."""

    def __init__(
        self, tokenizer: Tokenizer, settings: EncodeSettings, encoder: str, spill_folder: str
    ) -> None:
        self._reader = BlockReader(settings.keys, settings.separator)
        self._encoder: Encoder = build_encoder(tokenizer, encoder)
        self._filters = Filters(settings.filters)
        self._spill_folder = spill_folder
        dtype = tokenizer.token_dtype.newbyteorder("<")
        self._itemsize = dtype.itemsize
        if settings.prepend_bos and tokenizer.bos_id is None:
            raise ValueError(
                f"{tokenizer.path}: --prepend-bos, but the vocabulary has no begin-of-sequence token"
            )
        self._head = np.array([tokenizer.bos_id], dtype).tobytes() if settings.prepend_bos else b""
        self._tail = np.array([tokenizer.eod_id], dtype).tobytes() if settings.append_eod else b""
        self._dtype = dtype
        self._control_ids = (
            sorted(tokenizer.control_ids) if tokenizer.text_may_hold_control_ids else []
        )

    def __call__(self, block: Block) -> BlockResult:
        work = _Work(BlockResult(block.number))
        batch: list[Record] = []
        batch_characters = 0
        for record in self._reader.read(block):
            work.result.records += 1
            reason = (
                None
                if isinstance(record, (Reject, GiantText))
                else self._filters.reason_to_drop(record)
            )
            if isinstance(record, Reject) or isinstance(reason, Reject):
                work.reject(record if isinstance(record, Reject) else reason)
            elif reason:
                work.result.filtered[reason] += 1
            elif isinstance(record, GiantText):
                self._encode(batch, work)
                batch, batch_characters = [], 0
                self._encode_giant(record, work)
            else:
                batch.append(record)
                batch_characters += len(record.text)
                if batch_characters >= _BATCH_CHARACTERS:
                    self._encode(batch, work)
                    batch, batch_characters = [], 0
        self._encode(batch, work)
        reader = self._reader
        return work.finish(
            lines=reader.lines,
            read_bytes=reader.read_bytes,
            damaged_bytes=reader.damaged_bytes,
            digest=reader.digest,
        )

    def _encode(self, batch: list[Record], work: _Work) -> None:
        for record, content in zip(batch, self._tokens_of(batch, work), strict=True):
            if content is None:
                continue
            if not content:
                work.reject(
                    Reject(
                        record.path,
                        record.line,
                        "no tokens",
                        "the tokenizer makes nothing of the text",
                    )
                )
                continue
            if found := self._control_ids_in(content):
                work.reject(
                    Reject(
                        record.path,
                        record.line,
                        "control token in the text",
                        f"the tokenizer makes the control ids {found} of it, which would begin or end a document in its middle",
                    )
                )
                continue
            work.pieces += (self._head, content, self._tail)
            work.count(
                (len(self._head) + len(content) + len(self._tail)) // self._itemsize,
                text_bytes(record.text),
                self._filters.hash_of(record.text) if self._filters.wants_hashes else b"",
            )

    def _control_ids_in(self, content: bytes) -> list[int]:
        tokens = np.frombuffer(content, self._dtype)
        return [token_id for token_id in self._control_ids if (tokens == token_id).any()]

    def _tokens_of(self, batch: list[Record], work: _Work) -> list[bytes | None]:
        """Tokens of each record; None, and a reject, where the tokenizer itself fails on a text."""
        if not batch:
            return []
        try:
            return self._encoder.encode_batch([record.text for record in batch])
        except MemoryError:
            raise
        except Exception as error:  # tokenizer libraries raise bare Exceptions, for example without an unknown token
            if len(batch) > 1:
                return [content for record in batch for content in self._tokens_of([record], work)]
            work.reject(
                Reject(
                    batch[0].path,
                    batch[0].line,
                    "the tokenizer failed",
                    f"{type(error).__name__}: {error}"[:200],
                )
            )
            return [None]

    def _encode_giant(self, document: GiantText, work: _Work) -> None:
        """Encode a document too large to hold into a file of its own, or reject it."""
        spill = f"{self._spill_folder}/spill-{work.result.number}-{work.result.records}"
        try:
            if not isinstance(self._encoder, CachedEncoder):
                raise BadRecord(
                    "too large for this vocabulary",
                    "nothing proves where its texts may be cut, and the document is "
                    "too large to encode in one piece",
                )
            found = scan(document, self._encoder.forbidden)
            self._reader.add_to_digest(found.digest)
            if found.must_stay_whole:
                raise BadRecord(
                    "too large for this vocabulary",
                    "it holds a user-defined symbol, so it cannot be cut",
                )
            if dropped := self._filters.reason_to_drop_giant(found.characters):
                work.result.filtered[dropped] += 1
                return
            length_bytes = len(self._head) + len(self._tail)
            with open(spill, "wb") as stream:
                stream.write(self._head)
                for piece in encode_giant(document, self._encoder):
                    length_bytes += stream.write(piece)
                stream.write(self._tail)
            length = length_bytes // self._itemsize
            if length > MAX_SEQUENCE_TOKENS:
                raise BadRecord(
                    "too long", f"{length} tokens; the format ends at {MAX_SEQUENCE_TOKENS}"
                )
        except (BadRecord, OSError, EOFError, ValueError) as error:
            if os.path.exists(spill):
                os.unlink(spill)
            if isinstance(error, OSError) and error.filename in (None, spill):
                raise  # the output disk, not the document
            bad = error if isinstance(error, BadRecord) else BadRecord(DAMAGED_FILE, str(error))
            work.reject(Reject(document.path, document.line, bad.reason, bad.detail))
            return
        work.close_part()
        work.count(length, found.text_bytes, found.digest if self._filters.wants_hashes else b"")
        work.result.parts.append(Part(1, spill=spill))
        work.documents_in_parts += 1


class _Work:
    """A block's result while it grows."""

    def __init__(self, result: BlockResult) -> None:
        self.result = result
        self.pieces: list[bytes] = []
        self.documents_in_parts = 0
        self._lengths: list[int] = []
        self._sizes: list[int] = []
        self._hashes: list[bytes] = []

    def count(self, length_tokens: int, size_bytes: int, digest: bytes) -> None:
        self._lengths.append(length_tokens)
        self._sizes.append(size_bytes)
        self._hashes.append(digest)

    def reject(self, reject: Reject) -> None:
        self.result.rejects[reject.reason] += 1
        if self.result.rejects[reject.reason] <= SAMPLES_PER_REASON:
            self.result.reject_samples.append(reject)

    def close_part(self) -> None:
        documents = len(self._lengths) - self.documents_in_parts
        if documents:
            self.result.parts.append(Part(documents, b"".join(self.pieces)))
            self.pieces = []
            self.documents_in_parts += documents

    def finish(self, **facts: Any) -> BlockResult:
        self.close_part()
        result = self.result
        result.lengths_tokens = np.array(self._lengths, dtype=np.int32)
        result.text_bytes = np.array(self._sizes, dtype=np.int64)
        result.hashes = b"".join(self._hashes)
        for name, value in facts.items():
            setattr(result, name, value)
        return result
