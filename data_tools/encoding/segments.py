"""Where a text may be cut without changing its tokens, read from the vocabulary itself.

SentencePiece's BPE merges neighbouring symbols only into strings that are pieces. If no piece holds a character of class X
directly followed by one of class Y, no merge ever crosses such a place, and what is left of it and right of it are encoded
independently: cutting there is exact, by proof and not by trial. The classes are space, newline, ASCII letter, ASCII digit,
other ASCII, and everything else; the pairs that occur inside pieces are collected at load.

The proof needs byte fallback (no run of unknown characters that would be joined) and no normalisation. A literal U+2581 in a text,
SentencePiece's own sign for a space, is a space to such a model, and is made one before cutting. Unigram models sum scores in float32 from the start of the text, so even their
ties depend on what lies far to the left: they are never cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_slm.tokenization import Tokenizer

SPACE, NEWLINE, LETTER, DIGIT, OTHER_ASCII, BEYOND_ASCII = range(6)
SPACE_SIGN = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2


def class_of_byte() -> np.ndarray:
    """uint8 of 256: the class of each UTF-8 byte."""
    classes = np.full(256, BEYOND_ASCII, np.uint8)
    classes[:128] = OTHER_ASCII
    classes[ord("0") : ord("9") + 1] = DIGIT
    classes[ord("A") : ord("Z") + 1] = classes[ord("a") : ord("z") + 1] = LETTER
    classes[ord(" ")], classes[ord("\n")] = SPACE, NEWLINE
    return classes


@dataclass(frozen=True)
class CutRules:
    may_cut: np.ndarray
    """bool 6 x 6: left class, right class."""
    dummy_prefix: bool
    """The tokenizer puts a space before the text."""
    forbidden: tuple[str, ...]
    """A text that holds one of these is not cut at all."""
    inner: Any
    """Encodes one segment as it is inside a text: a SentencePieceProcessor without dummy prefix."""


def cut_rules(tokenizer: Tokenizer) -> CutRules | None:
    """The rules for this vocabulary, or None when nothing is proved and texts must be encoded whole."""
    if tokenizer.kind != "sentencepiece":
        return None
    return _sentencepiece_rules(tokenizer.backend.serialized_model_proto())


def _sentencepiece_rules(model: bytes) -> CutRules | None:
    import sentencepiece

    pieces, trainer, normalizer = _read_model(model)
    kinds = {kind for _, kind in pieces}
    byte_pieces = sum(kind == _BYTE for _, kind in pieces)
    proved = (
        trainer.get(3, 1) == _BPE
        and not trainer.get(24, 0)
        and byte_pieces == 256
        and kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
        and not normalizer.get(2, b"")
        and not normalizer.get(4, 1)
        and normalizer.get(5, 1)
    )
    if not proved:
        return None
    classes = class_of_byte()
    joined = np.zeros((6, 6), bool)
    forbidden = []
    for text, kind in pieces:
        if kind == _USER_DEFINED:  # matched before any merge: texts that hold one are encoded whole
            forbidden += [text, text.replace(SPACE_SIGN, " ")]
        if kind == _NORMAL and len(text) > 1:
            inside = classes[np.frombuffer(text.replace(SPACE_SIGN, " ").encode("utf-8"), np.uint8)]
            joined[inside[:-1], inside[1:]] = True
    joined[BEYOND_ASCII, BEYOND_ASCII] = True  # the bytes of one character
    may_cut = ~joined
    if not (may_cut[NEWLINE, :].all() and may_cut[:, NEWLINE].all()):
        return None  # documents of a batch are joined by newlines
    # Fields of one message given twice are merged, the later wins: the same model with add_dummy_prefix = false.
    inner = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
    return CutRules(may_cut, bool(normalizer.get(3, 1)), tuple(dict.fromkeys(forbidden)), inner)


def _read_model(model: bytes) -> tuple[list[tuple[str, int]], dict[int, Any], dict[int, Any]]:
    """(text, kind) of every piece, and the trainer's and normalizer's settings by field number.

    Read from the protobuf wire format directly: its Python package is no dependency of sentencepiece.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(model):
        if number == 1:
            fields = dict(_fields(value))
            pieces.append((fields.get(1, b"").decode("utf-8", "replace"), fields.get(3, _NORMAL)))
        elif number == 2:
            trainer.update(_fields(value))
        elif number == 3:
            normalizer.update(_fields(value))
    return pieces, trainer, normalizer


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = 8 if wire == 1 else 4
            value, at = message[at : at + size], at + size
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
