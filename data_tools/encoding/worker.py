"""What a worker does with a block: read its records, filter them, encode them, count them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.encoding.block_result import BlockResult, GrowingResult, reject_of
from data_tools.encoding.encoders import Encoder, build_encoder
from data_tools.encoding.filters import Filters, FilterSettings
from data_tools.encoding.giant_encoding import encode_giant
from data_tools.encoding.word_cache import CachedEncoder
from data_tools.reading.blocks import Block, BlockReader, Record
from data_tools.reading.documents import DAMAGED_FILE, BadRecord, Reject, text_bytes
from data_tools.reading.giant import GiantText, Scan, scan
from megatron_slm.data.indexed import MAX_SEQUENCE_TOKENS
from megatron_slm.tokenization import Tokenizer

_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class EncodeSettings:
    """Everything that decides the bytes of a block; part of the identity of a run."""

    keys: tuple[str, ...]
    separator: str
    append_eod: bool
    prepend_bos: bool
    filters: FilterSettings


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
                f"{tokenizer.path}: --prepend-bos, but the vocabulary has no begin-of-sequence "
                "token"
            )
        self._head = np.array([tokenizer.bos_id], dtype).tobytes() if settings.prepend_bos else b""
        self._tail = np.array([tokenizer.eod_id], dtype).tobytes() if settings.append_eod else b""
        self._dtype = dtype
        self._control_ids = (
            sorted(tokenizer.control_ids) if tokenizer.text_may_hold_control_ids else []
        )

    def __call__(self, block: Block) -> BlockResult:
        growing = GrowingResult(BlockResult(block.number))
        batch: list[Record] = []
        batch_characters = 0
        for record in self._reader.read(block):
            growing.result.records += 1
            if isinstance(record, Reject):
                growing.reject(record)
            elif isinstance(record, GiantText):
                self._encode(batch, growing)
                batch = []
                batch_characters = 0
                self._encode_giant(record, growing)
            elif self._keeps(record, growing):
                batch.append(record)
                batch_characters += len(record.text)
                if batch_characters >= _BATCH_CHARACTERS:
                    self._encode(batch, growing)
                    batch = []
                    batch_characters = 0
        self._encode(batch, growing)
        reader = self._reader
        return growing.finish(
            lines=reader.lines,
            read_bytes=reader.read_bytes,
            damaged_bytes=reader.damaged_bytes,
            digest=reader.digest,
        )

    def _keeps(self, record: Record, growing: GrowingResult) -> bool:
        """Whether the filters keep the record; a dropped one is counted."""
        reason = self._filters.reason_to_drop(record)
        if isinstance(reason, Reject):
            growing.reject(reason)
        elif reason is not None:
            growing.result.filtered[reason] += 1
        return reason is None

    def _encode(self, batch: list[Record], growing: GrowingResult) -> None:
        for record, content in zip(batch, self._tokens_of(batch, growing), strict=True):
            if content is None:
                continue
            if not content:
                bad = BadRecord("no tokens", "the tokenizer makes nothing of the text")
                growing.reject(reject_of(record, bad))
                continue
            if control_ids := self._control_ids_in(content):
                bad = BadRecord(
                    "control token in the text",
                    f"the tokenizer makes the control ids {control_ids} of it, which would begin "
                    "or end a document in its middle",
                )
                growing.reject(reject_of(record, bad))
                continue
            growing.add(
                (self._head, content, self._tail),
                (len(self._head) + len(content) + len(self._tail)) // self._itemsize,
                text_bytes(record.text),
                self._filters.hash_of(record.text) if self._filters.wants_hashes else b"",
            )

    def _control_ids_in(self, content: bytes) -> list[int]:
        tokens = np.frombuffer(content, self._dtype)
        return [token_id for token_id in self._control_ids if (tokens == token_id).any()]

    def _tokens_of(self, batch: list[Record], growing: GrowingResult) -> Sequence[bytes | None]:
        """Tokens of each record; None, and a reject, where the tokenizer itself fails on a text."""
        if not batch:
            return []
        try:
            return self._encoder.encode_batch([record.text for record in batch])
        except MemoryError:
            raise
        except Exception as error:
            # Tokenizer libraries raise bare Exceptions, for example for want of an unknown token.
            if len(batch) > 1:
                return [
                    content for record in batch for content in self._tokens_of([record], growing)
                ]
            bad = BadRecord("the tokenizer failed", f"{type(error).__name__}: {error}"[:200])
            growing.reject(reject_of(batch[0], bad))
            return [None]

    def _encode_giant(self, document: GiantText, growing: GrowingResult) -> None:
        """Encode a document that is too large to hold into a file of its own, or reject it."""
        result = growing.result
        spill = f"{self._spill_folder}/spill-{result.number}-{result.records}"
        try:
            facts = self._scan(document)
            if dropped := self._filters.reason_to_drop_giant(facts.characters):
                result.filtered[dropped] += 1
                return
            length_tokens = self._spill_tokens(document, spill)
        except (BadRecord, OSError, EOFError, ValueError) as error:
            if os.path.exists(spill):
                os.unlink(spill)
            if isinstance(error, OSError) and error.filename in (None, spill):
                raise  # the output disk failed; the document is not at fault
            bad = error if isinstance(error, BadRecord) else BadRecord(DAMAGED_FILE, str(error))
            growing.reject(reject_of(document, bad))
            return
        growing.add_spill(
            spill,
            length_tokens,
            facts.text_bytes,
            facts.digest if self._filters.wants_hashes else b"",
        )

    def _scan(self, document: GiantText) -> Scan:
        """Read the document once. Raises BadRecord when it cannot be encoded in pieces."""
        if not isinstance(self._encoder, CachedEncoder):
            raise BadRecord(
                "too large for this vocabulary",
                "nothing proves where its texts may be cut, and the document is too large to "
                "encode in one piece",
            )
        facts = scan(document, self._encoder.forbidden)
        self._reader.add_to_digest(facts.digest)
        if facts.must_stay_whole:
            raise BadRecord(
                "too large for this vocabulary",
                "it holds a user-defined symbol, so it cannot be cut",
            )
        return facts

    def _spill_tokens(self, document: GiantText, path: str) -> int:
        """Write the tokens of the document to `path`; returns how many. Raises BadRecord."""
        assert isinstance(self._encoder, CachedEncoder)  # _scan has refused the document otherwise
        length_bytes = len(self._head) + len(self._tail)
        with open(path, "wb") as file:
            file.write(self._head)
            for piece in encode_giant(document, self._encoder):
                length_bytes += file.write(piece)
            file.write(self._tail)
        length_tokens = length_bytes // self._itemsize
        if length_tokens > MAX_SEQUENCE_TOKENS:
            raise BadRecord(
                "too long", f"{length_tokens} tokens; the format ends at {MAX_SEQUENCE_TOKENS}"
            )
        return length_tokens
