"""One tokenizer class over two kinds of vocabulary file: SentencePiece `.model` and Hugging Face `tokenizer.json`.

Everything that must agree about a vocabulary (tokenizer programs, preprocessing, training, export) asks this room for
sizes, special ids and the fingerprint. No torch here: data programs import it on machines that have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.files.export_note import read_export_note

# megatron-core's writer takes uint16 below this and int32 from here on (DType.optimal_dtype), although its fast-load path
# assumes uint16 up to 65536. Following the writer, and recording the dtype in the manifest, keeps 65500..65536 unambiguous.
UINT16_VOCABULARY_LIMIT = 65_500

# Names that published vocabularies use, in order of preference, for a tokenizer.json that lies alone in its folder.
_WELL_KNOWN = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>"),
    "eos_token": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
}


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The dtype tokens of this vocabulary have on disk: uint16 below 65 500 ids, else int32 (megatron-core's own rule)."""
    return np.dtype(np.uint16 if vocabulary_size < UINT16_VOCABULARY_LIMIT else np.int32)


class Tokenizer:
    """A vocabulary with its encoder. Make one with `load_tokenizer`; a pickle holds the path only and loads again.

    Literal control strings in a text (`</s>`, `<|endoftext|>`) are encoded as ordinary characters, never as the control id:
    a document cannot end itself. Where the unknown token is a control token, texts can still give
    its id: preprocessing rejects such documents. `eod_id`, which closes documents, is the end-of-sequence id, else the begin-of-sequence id.
    """

    path: Path
    kind: str
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    eod_id: int
    control_ids: frozenset[int]
    """Ids that begin, end or pad documents, which no text may give; the unknown id only where it
    is eod_id."""
    text_may_hold_control_ids: bool
    """Whether nothing proves that texts never give a control id. SentencePiece never gives one."""
    fingerprint: str

    def __init__(
        self,
        path: Path,
        kind: str,
        backend: Any,
        special_ids: dict[str, int | None],
        vocabulary_size: int,
        content: bytes,
        encoder: Any = None,
    ) -> None:
        self.path, self.kind, self._backend = path, kind, backend
        self._encoder = backend if encoder is None else encoder
        self.bos_id, self.eos_id = special_ids["bos_token"], special_ids["eos_token"]
        self.pad_id, self.unk_id = special_ids["pad_token"], special_ids["unk_token"]
        self.vocabulary_size = vocabulary_size
        self.fingerprint = "sha256:" + hashlib.sha256(content).hexdigest()
        eod_id = self.eos_id if self.eos_id is not None else self.bos_id
        if eod_id is None:
            raise ValueError(
                f"{path}: the vocabulary has neither an end-of-sequence nor a begin-of-sequence token, so documents cannot be "
                "closed. Train it with such a token, or name one as eos_token in a tokenizer_config.json beside it."
            )
        self.eod_id = eod_id
        self.control_ids = frozenset({self.bos_id, self.eos_id, self.pad_id}) - {None, self.unk_id}
        self.control_ids |= {eod_id}
        self.text_may_hold_control_ids = kind != "sentencepiece" or not all(
            backend.is_control(control_id) for control_id in self.control_ids
        )

    def __reduce__(self):
        return load_tokenizer, (str(self.path),)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, {self.kind}, {self.vocabulary_size} ids, eod {self.eod_id})"

    @property
    def entry(self) -> dict[str, Any]:
        """What manifests and checkpoints keep of it; compared by `tokenizer_differences`."""
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
        """The SentencePieceProcessor or tokenizers.Tokenizer behind it, for programs that need more than text and ids."""
        return self._backend

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no begin or end token is added."""
        if self.kind == "sentencepiece":
            return self._encoder.encode(text)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back (`token_dtype`) and how many each text gave (int64). No begin or end tokens."""
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
        ids = [int(token_id) for token_id in ids]
        if self.kind == "sentencepiece":
            return self._backend.decode(ids)
        return self._backend.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """What one token looks like to a reader; single bytes that are not ASCII show as <0xNN>."""
        token_id = int(token_id)
        if not 0 <= token_id < self.vocabulary_size:
            raise ValueError(
                f"token id {token_id} is outside the vocabulary of {self.vocabulary_size} ids in {self.path}"
            )
        if self.kind == "sentencepiece":
            piece = self._backend.id_to_piece(token_id)
            if self._backend.is_byte(token_id):
                byte = int(piece[3:5], 16)
                return chr(byte) if byte < 0x80 else piece
            return piece if self._backend.is_control(token_id) else piece.replace("\u2581", " ")
        text = self._backend.decode([token_id], skip_special_tokens=False)
        return (self._backend.id_to_token(token_id) or "") if "\ufffd" in text or not text else text


IDENTITY = ("fingerprint", "eod_id", "bos_id")


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
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    Of a folder that export_hf wrote, it is the file that the model's corpora were made with.

    Raises ValueError with a sentence when the file is missing, is neither kind, or has no token that can end a document.
    """
    path = _resolve(Path(path))
    content = path.read_bytes()
    if path.suffix == ".json":
        return _load_huggingface(path, content)
    return _load_sentencepiece(path, content)


def _resolve(path: Path) -> Path:
    if path.is_dir():
        note = read_export_note(path)
        if note is not None:
            return path / note["tokenizer_file"]
        found = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.model"))]
        for candidate in found:
            if candidate.is_file():
                return candidate
        raise ValueError(
            f"{path}: the folder holds neither a tokenizer.json nor a SentencePiece .model file"
        )
    if not path.is_file():
        raise ValueError(
            f"{path}: no such tokenizer file. Give a SentencePiece .model or a Hugging Face tokenizer.json."
        )
    return path


def _load_sentencepiece(path: Path, content: bytes) -> Tokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = processor.vocab_size()
    except Exception as error:  # sentencepiece raises RuntimeError, ValueError or TypeError, depending on what is wrong
        raise ValueError(
            f"{path}: not a SentencePiece model ({error}). Expected the P.model that tokenizer.train writes, "
            "or a Hugging Face tokenizer.json."
        ) from None
    if size == 0:
        raise ValueError(f"{path}: not a SentencePiece model (it holds no pieces)")
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
        "unk_token": processor.unk_id(),
    }
    return Tokenizer(
        path,
        "sentencepiece",
        processor,
        {name: i if i >= 0 else None for name, i in ids.items()},
        size,
        content,
    )


def _load_huggingface(path: Path, content: bytes) -> Tokenizer:
    try:
        text = content.decode("utf-8")
        backend = _encodes_text_only(text)
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ValueError(f"{path}: the vocabulary is empty")
    special_ids = _special_ids(path, vocabulary)
    control_ids = {special_ids[name] for name in ("bos_token", "eos_token", "pad_token")} - {None}
    controls = {name for name, token_id in vocabulary.items() if token_id in control_ids}
    return Tokenizer(
        path,
        "huggingface",
        backend,
        special_ids,
        max(vocabulary.values()) + 1,
        content,
        encoder=_without_controls(backend, text, controls),
    )


def _encodes_text_only(settings: str) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(settings)
    backend.no_truncation()  # a saved truncation or padding setting would cut or fill documents
    backend.no_padding()
    backend.encode_special_tokens = True  # literal strings of special added tokens stay text
    return backend


def _without_controls(backend: Any, text: str, controls: set[str]) -> Any:
    """`backend`, or one for encoding alone: equal ids, but control strings are characters to it.

    encode_special_tokens is not enough where a control string is an added token without the mark
    `special`, or an entry of the model's own vocabulary (Unigram, WordLevel, WordPiece, BPE that
    merges up to it or ignores merges). Added tokens get the mark here; entries are renamed to a
    string that begins with NUL, which no document holds, so every id stays.
    """
    own = backend.get_vocab(with_added_tokens=False).keys() & controls
    unmarked = {
        token.content for token in backend.get_added_tokens_decoder().values() if not token.special
    }
    if not own and not unmarked & controls:
        return backend
    settings = json.loads(text)
    model = settings["model"]
    # An added token takes its id from the model's vocabulary, or the next free one: renamed, it
    # would move those after it.
    settings["added_tokens"] = [
        {**token, "special": token["special"] or token["content"] in controls}
        for token in settings["added_tokens"]
        if token["content"] not in own
    ]
    renamed = {name: f"\0{name}" for name in own if name != model.get("unk_token")}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {
            renamed.get(name, name): token_id for name, token_id in model["vocab"].items()
        }
    else:
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if not {left, right, left + right.removeprefix(prefix)} & renamed.keys()
        ]
    return _encodes_text_only(json.dumps(settings, ensure_ascii=False))


def _special_ids(path: Path, vocabulary: dict[str, int]) -> dict[str, int | None]:
    """tokenizer.json does not say which token means what; the files beside it do, else well-known names decide."""
    named: dict[str, str] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = path.with_name(file_name)
        if not beside.is_file():
            continue
        try:
            settings = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{beside}: not valid JSON ({error}); it names the special tokens of {path.name}"
            ) from None
        for name in _WELL_KNOWN:
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                if value not in vocabulary:
                    raise ValueError(
                        f"{beside}: {name} is {value!r}, which {path.name} does not hold"
                    )
                named[name] = value
    special_ids: dict[str, int | None] = {}
    for name, candidates in _WELL_KNOWN.items():
        candidates = (named[name],) if name in named else candidates
        special_ids[name] = next(
            (vocabulary[text] for text in candidates if text in vocabulary), None
        )
    return special_ids
