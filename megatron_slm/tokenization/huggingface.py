"""Reads a vocabulary from a Hugging Face tokenizer.json and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SpecialIds = Mapping[str, int | None]
"""The ids of bos_token, eos_token, pad_token and unk_token; None for one that there is not."""

_WELL_KNOWN = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>"),
    "eos_token": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
}
"""Names that published vocabularies use, in order of preference.

They are looked for where no file beside the tokenizer.json names the special tokens.
"""


@dataclass(frozen=True)
class HuggingFaceVocabulary:
    """Both tokenizers give equal ids, but to `encoder` control strings in a text are characters."""

    backend: Any
    """The tokenizers.Tokenizer of the file."""
    encoder: Any
    special_ids: SpecialIds
    size: int


def read_huggingface(path: Path, content: bytes) -> HuggingFaceVocabulary:
    """The vocabulary in `content`, that of the tokenizer.json at `path`. Raises ValueError."""
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
    return HuggingFaceVocabulary(
        backend,
        _without_controls(backend, text, controls),
        special_ids,
        max(vocabulary.values()) + 1,
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
    in_model = backend.get_vocab(with_added_tokens=False).keys() & controls
    unmarked = {
        token.content for token in backend.get_added_tokens_decoder().values() if not token.special
    }
    if not in_model and not unmarked & controls:
        return backend
    settings = json.loads(text)
    model = settings["model"]
    # An added token takes its id from the model's vocabulary, or the next free one: renamed, it
    # would move those after it.
    settings["added_tokens"] = [
        {**token, "special": token["special"] or token["content"] in controls}
        for token in settings["added_tokens"]
        if token["content"] not in in_model
    ]
    renamed = {name: f"\0{name}" for name in in_model if name != model.get("unk_token")}
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


def _special_ids(path: Path, vocabulary: Mapping[str, int]) -> SpecialIds:
    """The ids of the special tokens.

    tokenizer.json does not say which token means what. The files beside it do; where they do not,
    well-known names decide.
    """
    named = _named_beside(path, vocabulary)
    special_ids = {}
    for name, well_known in _WELL_KNOWN.items():
        candidates = (named[name],) if name in named else well_known
        found = (vocabulary[text] for text in candidates if text in vocabulary)
        special_ids[name] = next(found, None)
    return special_ids


def _named_beside(path: Path, vocabulary: Mapping[str, int]) -> dict[str, str]:
    """The special tokens that files beside `path` name; the later file overrides the earlier."""
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
            if not isinstance(value, str):
                continue
            if value not in vocabulary:
                raise ValueError(f"{beside}: {name} is {value!r}, which {path.name} does not hold")
            named[name] = value
    return named
