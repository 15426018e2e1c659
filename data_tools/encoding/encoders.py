"""From texts to the bytes of the .bin.

Either the tokenizer encodes them, or the word cache does where it is proved exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from data_tools.encoding.segments import cut_rules
from data_tools.encoding.word_cache import CachedEncoder
from megatron_slm.tokenization import Tokenizer


class Encoder(Protocol):
    """Turns texts into little-endian tokens of the tokenizer's dtype, equal to Tokenizer.encode."""

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]: ...


class PlainEncoder:
    """The tokenizer itself: one call per document (SentencePiece) or per batch (Hugging Face)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        tokens, lengths = self._tokenizer.encode_batch(texts)
        content = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
        ends = (lengths.cumsum() * tokens.itemsize).tolist()
        return [content[start:end] for start, end in pairwise([0, *ends])]


def build_encoder(tokenizer: Tokenizer, name: str = "auto") -> Encoder:
    """`plain`: the tokenizer; `auto`: the word cache where the pieces prove it exact."""
    if name == "auto" and (rules := cut_rules(tokenizer)) is not None:
        return CachedEncoder(tokenizer, rules)
    return PlainEncoder(tokenizer)
