"""One tokenizer class over two kinds of vocabulary file: SentencePiece `.model` and Hugging Face
`tokenizer.json`.

Everything that must agree about a vocabulary (tokenizer programs, preprocessing, training, export)
gets sizes, special ids and the fingerprint from this package. It does not import torch, because
data programs run on machines that have none.
"""

from megatron_slm.tokenization.tokenizer import (
    IDENTITY,
    Tokenizer,
    VocabularyFileError,
    load_tokenizer,
    token_dtype,
    tokenizer_differences,
)

__all__ = [
    "IDENTITY",
    "Tokenizer",
    "VocabularyFileError",
    "load_tokenizer",
    "token_dtype",
    "tokenizer_differences",
]
