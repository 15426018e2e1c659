"""The Tokenizer class, and how one is made from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.files.export_note import read_export_note
from megatron_slm.tokenization.huggingface import SpecialIds, read_huggingface

UINT16_VOCABULARY_LIMIT = 65_500
"""The first size of a vocabulary whose tokens are int32.

megatron-core's writer (DType.optimal_dtype) takes uint16 below it and int32 from there on, although
its fast-load path assumes uint16 up to 65536. Following the writer, and recording the dtype in the
manifest, keeps vocabularies of 65500 to 65536 ids unambiguous.
"""
IDENTITY = ("fingerprint", "eod_id", "bos_id")
"""Fields of a tokenizer's entry that must agree wherever two of them meet."""


class VocabularyFileError(ValueError):
    """A vocabulary file that is missing, is of no known kind, or cannot close documents."""


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The dtype that tokens have on disk: uint16 for vocabularies below 65 500 ids, else int32."""
    return np.dtype(np.uint16 if vocabulary_size < UINT16_VOCABULARY_LIMIT else np.int32)


class Tokenizer:
    """A vocabulary with its encoder. Make one with `load_tokenizer`.

    A pickle holds the path only, and loads the file again.

    Literal control strings in a text (`</s>`, `<|endoftext|>`) are encoded as ordinary characters,
    never as the control id: a document cannot end itself. Where the unknown token is a control
    token, texts can still give its id, and preprocessing rejects such documents.
    """

    path: Path
    kind: str
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    eod_id: int
    """The id that closes documents: the end-of-sequence id, else the begin-of-sequence id."""
    control_ids: frozenset[int]
    """Ids that begin, end or pad documents, which no text may give.

    The unknown id is one of them only where it is eod_id.
    """
    text_may_hold_control_ids: bool
    """Whether nothing proves that texts never give a control id. SentencePiece never gives one."""
    fingerprint: str

    def __init__(
        self,
        path: Path,
        kind: str,
        backend: Any,
        special_ids: SpecialIds,
        vocabulary_size: int,
        content: bytes,
        encoder: Any = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self._backend = backend
        self._encoder = backend if encoder is None else encoder
        self.bos_id = special_ids["bos_token"]
        self.eos_id = special_ids["eos_token"]
        self.pad_id = special_ids["pad_token"]
        self.unk_id = special_ids["unk_token"]
        self.vocabulary_size = vocabulary_size
        self.fingerprint = "sha256:" + hashlib.sha256(content).hexdigest()
        eod_id = self.eos_id if self.eos_id is not None else self.bos_id
        if eod_id is None:
            raise VocabularyFileError(
                f"{path}: the vocabulary has neither an end-of-sequence nor a begin-of-sequence "
                "token, so documents cannot be closed. Train it with such a token, or name one as "
                "eos_token in a tokenizer_config.json beside it."
            )
        self.eod_id = eod_id
        named = {self.bos_id, self.eos_id, self.pad_id} - {self.unk_id}
        self.control_ids = frozenset({eod_id, *(i for i in named if i is not None)})
        self.text_may_hold_control_ids = kind != "sentencepiece" or not all(
            backend.is_control(control_id) for control_id in self.control_ids
        )

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return load_tokenizer, (str(self.path),)

    def __repr__(self) -> str:
        return (
            f"Tokenizer({str(self.path)!r}, {self.kind}, {self.vocabulary_size} ids, "
            f"eod {self.eod_id})"
        )

    @property
    def entry(self) -> dict[str, Any]:
        """What manifests and checkpoints keep of it; `tokenizer_differences` compares it."""
        return {
            "path": str(self.path.resolve()),
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
            "eod_id": self.eod_id,
            "bos_id": self.bos_id,
        }

    @property
    def token_dtype(self) -> np.dtype:
        return token_dtype(self.vocabulary_size)

    @property
    def backend(self) -> Any:
        """The SentencePieceProcessor or tokenizers.Tokenizer that does the work.

        For programs that need more than text and ids.
        """
        return self._backend

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no begin or end token is added."""
        if self.kind == "sentencepiece":
            return self._encoder.encode(text)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back (`token_dtype`), and how many each text gave (int64).

        No begin or end token is added.
        """
        if self.kind == "sentencepiece":
            pieces = [self._encoder.encode_as_numpy(text) for text in texts]
        else:
            pieces = [
                encoding.ids
                for encoding in self._encoder.encode_batch_fast(
                    list(texts), add_special_tokens=False
                )
            ]
        lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        flat = np.empty(int(lengths.sum()), dtype=self.token_dtype)
        start = 0
        for piece, length in zip(pieces, lengths.tolist(), strict=True):
            flat[start : start + length] = piece
            start += length
        return flat, lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        numbers = [int(token_id) for token_id in ids]
        if self.kind == "sentencepiece":
            return self._backend.decode(numbers)
        return self._backend.decode(numbers, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """What one token looks like to a reader; single bytes that are not ASCII show as <0xNN>."""
        token_id = int(token_id)
        if not 0 <= token_id < self.vocabulary_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary of {self.vocabulary_size} ids in "
                f"{self.path}"
            )
        if self.kind == "sentencepiece":
            piece = self._backend.id_to_piece(token_id)
            if self._backend.is_byte(token_id):
                byte = int(piece[3:5], 16)
                return chr(byte) if byte < 0x80 else piece
            return piece if self._backend.is_control(token_id) else piece.replace("\u2581", " ")
        text = self._backend.decode([token_id], skip_special_tokens=False)
        return (self._backend.id_to_token(token_id) or "") if "\ufffd" in text or not text else text


def tokenizer_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One phrase with both values per field in which two tokenizers' entries differ.

    The file's fingerprint is not all of it: which tokens begin and end documents is read from the
    files beside a tokenizer.json. A field that an entry lacks, as bos_id in entries of earlier
    versions, is not compared.
    """
    return [
        f"{name} {_brief(ours[name])} and {_brief(theirs[name])}"
        for name in IDENTITY
        if name in ours and name in theirs and ours[name] != theirs[name]
    ]


def _brief(value: Any) -> str:
    return f"{value[:19]}…" if isinstance(value, str) and len(value) > 20 else str(value)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of
    them.

    In a folder that export_hf wrote, it is the file that the model's corpora were made with.

    Raises VocabularyFileError, a ValueError, with a sentence when the file is missing, is neither
    kind, or has no token that can end a document.
    """
    file = _file_of(Path(path))
    content = file.read_bytes()
    if file.suffix != ".json":
        return _load_sentencepiece(file, content)
    try:
        vocabulary = read_huggingface(file, content)
    except ValueError as error:
        raise VocabularyFileError(str(error)) from None
    return Tokenizer(
        file,
        "huggingface",
        vocabulary.backend,
        vocabulary.special_ids,
        vocabulary.size,
        content,
        encoder=vocabulary.encoder,
    )


def _file_of(path: Path) -> Path:
    """The vocabulary file that `path` is, or that the folder `path` holds."""
    if path.is_dir():
        note = read_export_note(path)
        if note is not None:
            return path / note["tokenizer_file"]
        usual = (path / "tokenizer.json", path / "tokenizer.model")
        for candidate in (*usual, *sorted(path.glob("*.model"))):
            if candidate.is_file():
                return candidate
        raise VocabularyFileError(
            f"{path}: the folder holds neither a tokenizer.json nor a SentencePiece .model file"
        )
    if not path.is_file():
        raise VocabularyFileError(
            f"{path}: no such tokenizer file. Give a SentencePiece .model or a Hugging Face "
            "tokenizer.json."
        )
    return path


def _load_sentencepiece(path: Path, content: bytes) -> Tokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = processor.vocab_size()
    except Exception as error:
        # sentencepiece raises RuntimeError, ValueError or TypeError, depending on what is wrong.
        raise VocabularyFileError(
            f"{path}: not a SentencePiece model ({error}). Expected the P.model that "
            "tokenizer.train writes, or a Hugging Face tokenizer.json."
        ) from None
    if size == 0:
        raise VocabularyFileError(f"{path}: not a SentencePiece model (it holds no pieces)")
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
        "unk_token": processor.unk_id(),
    }
    special_ids = {name: i if i >= 0 else None for name, i in ids.items()}
    return Tokenizer(path, "sentencepiece", processor, special_ids, size, content)
