"""How many bytes of text each token stands for: what bits per byte divides by."""

import json
import re

import numpy as np

from megatron_slm.tokenization.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ANCHOR = "a"
"""A text before the token: some decoders leave out a space at the very beginning."""


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [ids of the vocabulary]: UTF-8 bytes of the text that each token adds to what stands
    before it; 0 for control tokens, -1 for the unknown token, whose text is lost.

    The sum over a document's tokens without its first is the size of what they decode to. (The
    first is another matter: many vocabularies begin each text with a space that was not in it.)
    """
    count = _of_sentencepiece if tokenizer.kind == "sentencepiece" else _of_huggingface
    sizes = count(tokenizer)
    sizes[sorted(tokenizer.control_ids)] = 0
    if tokenizer.unk_id is not None and tokenizer.unk_id not in tokenizer.control_ids:
        sizes[tokenizer.unk_id] = -1
    return sizes


def _of_sentencepiece(tokenizer: Tokenizer) -> np.ndarray:
    backend = tokenizer.backend
    sizes = np.zeros(tokenizer.vocabulary_size, np.int64)
    for token_id in range(tokenizer.vocabulary_size):
        if backend.is_byte(token_id):
            sizes[token_id] = 1
        elif not (backend.is_control(token_id) or backend.is_unused(token_id)):
            sizes[token_id] = len(backend.id_to_piece(token_id).replace("\u2581", " ").encode())
    return sizes


def _of_huggingface(tokenizer: Tokenizer) -> np.ndarray:
    backend = tokenizer.backend
    settings = json.loads(backend.to_str())
    added = {token["id"]: token for token in settings["added_tokens"]}
    is_byte_level = '"ByteLevel"' in json.dumps(settings["decoder"])
    sizes = np.zeros(tokenizer.vocabulary_size, np.int64)
    in_context: list[int] = []
    for token_id in range(tokenizer.vocabulary_size):
        text = backend.id_to_token(token_id)
        if text is None:  # a hole in the ids, which no text gives
            continue
        if token_id in added:
            sizes[token_id] = 0 if added[token_id]["special"] else len(text.encode())
        elif is_byte_level:
            sizes[token_id] = len(text)  # each character of such a vocabulary stands for one byte
        elif _BYTE_PIECE.fullmatch(text):
            sizes[token_id] = 1
        else:
            in_context.append(token_id)
    if in_context:
        before = tokenizer.encode(_ANCHOR)
        alone_bytes = len(backend.decode(before).encode())
        decoded = backend.decode_batch([[*before, token_id] for token_id in in_context])
        sizes[in_context] = [len(text.encode()) - alone_bytes for text in decoded]
    return sizes
