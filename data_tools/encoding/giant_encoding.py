"""The tokens of a document too large to hold, made piece by piece.

Encoding in pieces is exact for vocabularies with cut rules (segments.py). For other vocabularies
nothing proves what the tokens would be, so the worker rejects a giant document with a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.encoding.word_cache import CachedEncoder
from data_tools.reading.documents import BadRecord
from data_tools.reading.giant import GIANT_BYTES, PIECE_BYTES, GiantText


def encode_giant(document: GiantText, encoder: CachedEncoder) -> Iterator[bytes]:
    """Tokens of the document in pieces.

    Raises BadRecord when a stretch of GIANT_BYTES offers no place to cut.
    """
    carry = encoder.prefix
    for piece in document.pieces():
        carry += encoder.as_bytes(piece)
        if len(carry) < PIECE_BYTES:
            continue
        end = encoder.last_cut(carry)
        if end:
            yield encoder.encode_part(carry[:end])
            carry = carry[end:]
        elif len(carry) > GIANT_BYTES:
            raise BadRecord("too long to encode", f"{len(carry)} bytes without a place to cut")
    if carry:
        yield encoder.encode_part(carry)
