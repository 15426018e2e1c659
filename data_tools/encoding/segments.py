"""Where a text may be cut without changing its tokens, read from the vocabulary itself.

SentencePiece's BPE merges neighbouring symbols only into strings that are pieces. If no piece holds
a character of class X directly followed by one of class Y, no merge ever crosses such a place, and
the text before it and the text after it are encoded independently. Cutting there is exact by proof,
not by trial. The classes are space, newline, ASCII letter, ASCII digit, other ASCII, and everything
else; the pairs that occur inside pieces are collected when the vocabulary is loaded.

The proof needs byte fallback (without it, a run of unknown characters would be joined) and no
normalisation. A literal U+2581, SentencePiece's own sign for a space, is a space to such a model,
and is replaced by one before cutting. Unigram models are never cut: they sum scores in float32 from
the start of the text, so even their ties depend on what lies far to the left.
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
# Field numbers of sentencepiece_model.proto: TrainerSpec, then NormalizerSpec.
_MODEL_TYPE = 3
_TREAT_WHITESPACE_AS_SUFFIX = 24
_PRECOMPILED_CHARSMAP = 2
_ADD_DUMMY_PREFIX = 3
_REMOVE_EXTRA_WHITESPACES = 4
_ESCAPE_WHITESPACES = 5


def class_of_byte() -> np.ndarray:
    """uint8 of 256: the class of each UTF-8 byte."""
    classes = np.full(256, BEYOND_ASCII, np.uint8)
    classes[:128] = OTHER_ASCII
    classes[ord("0") : ord("9") + 1] = DIGIT
    classes[ord("A") : ord("Z") + 1] = classes[ord("a") : ord("z") + 1] = LETTER
    classes[ord(" ")] = SPACE
    classes[ord("\n")] = NEWLINE
    return classes


@dataclass(frozen=True)
class CutRules:
    """Where texts may be cut for one vocabulary, and what encodes the segments."""

    may_cut: np.ndarray
    """bool 6 x 6: the class before the cut, the class after it."""
    dummy_prefix: bool
    """Whether the tokenizer puts a space before the text."""
    forbidden: tuple[str, ...]
    """A text that holds one of these is not cut at all."""
    inner: Any
    """A SentencePieceProcessor without dummy prefix: it encodes a segment as if inside a text."""


def cut_rules(tokenizer: Tokenizer) -> CutRules | None:
    """The rules for this vocabulary; None when nothing is proved and texts stay whole."""
    if tokenizer.kind != "sentencepiece":
        return None
    return _sentencepiece_rules(tokenizer.backend.serialized_model_proto())


def _sentencepiece_rules(model: bytes) -> CutRules | None:
    import sentencepiece

    pieces, trainer, normalizer = _read_model(model)
    if not _is_proved(pieces, trainer, normalizer):
        return None
    classes = class_of_byte()
    joined = np.zeros((6, 6), bool)
    forbidden = []
    for text, kind in pieces:
        spaced = text.replace(SPACE_SIGN, " ")
        if kind == _USER_DEFINED:
            # Such a symbol is matched before any merge: a text that holds one is encoded whole.
            forbidden += [text, spaced]
        if kind == _NORMAL and len(text) > 1:
            inside = classes[np.frombuffer(spaced.encode("utf-8"), np.uint8)]
            joined[inside[:-1], inside[1:]] = True
    joined[BEYOND_ASCII, BEYOND_ASCII] = True  # the bytes of one character
    may_cut = ~joined
    if not (may_cut[NEWLINE, :].all() and may_cut[:, NEWLINE].all()):
        return None  # the word cache joins the documents of a batch by newlines
    # Protobuf: a later occurrence of a field overrides an earlier one, so appending these bytes
    # sets add_dummy_prefix = false.
    inner = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
    return CutRules(
        may_cut,
        bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)),
        tuple(dict.fromkeys(forbidden)),
        inner,
    )


def _is_proved(
    pieces: list[tuple[str, int]], trainer: dict[int, Any], normalizer: dict[int, Any]
) -> bool:
    """Whether the proof at the head of this file holds for the model."""
    kinds = {kind for _, kind in pieces}
    byte_pieces = sum(kind == _BYTE for _, kind in pieces)
    return (
        trainer.get(_MODEL_TYPE, 1) == _BPE
        and not trainer.get(_TREAT_WHITESPACE_AS_SUFFIX, 0)
        and byte_pieces == 256
        and kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
        and not normalizer.get(_PRECOMPILED_CHARSMAP, b"")
        and not normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1)
        and bool(normalizer.get(_ESCAPE_WHITESPACES, 1))
    )


def _read_model(model: bytes) -> tuple[list[tuple[str, int]], dict[int, Any], dict[int, Any]]:
    """(text, kind) of every piece, and the trainer's and normalizer's settings by field number.

    The protobuf wire format is read directly, because sentencepiece does not install the Python
    package of protobuf.
    """
    pieces: list[tuple[str, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
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
    """(number, value) of every field of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, at = _varint(message, at)
        else:
            size = 8 if wire_type == 1 else 4
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The protobuf integer of variable length at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
