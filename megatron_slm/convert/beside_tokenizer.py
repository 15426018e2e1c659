"""What lies beside a tokenizer and belongs to the model that is exported with it: chat templates,
settings of generation, every id at which generation stops, further special tokens.

A model that goes on from a published one keeps them; without its other end tokens a chat model
would run past the end of its turn.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.files.plain import json_object
from megatron_slm.tokenization import Tokenizer

TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER = "additional_chat_templates"
_GENERATION = "generation_config.json"
_NOT_CARRIED = (
    "auto_map",
    "tokenizer_file",
    "vocab_file",
    "name_or_path",
    "special_tokens_map_file",
)
"""Settings of a tokenizer_config.json that name files or code of the other folder."""


@dataclass(frozen=True)
class Beside:
    """The files beside one tokenizer, read."""

    folder: Path
    tokenizer_settings: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json, over special_tokens_map.json."""
    generation: dict[str, Any] = field(default_factory=dict)
    """generation_config.json."""
    end_ids: tuple[int, ...] = ()
    """The ids at which generation stops, in generation_config.json and config.json."""
    templates: tuple[str, ...] = ()
    """Files of chat templates, as paths in the folder."""

    @property
    def fingerprint(self) -> str | None:
        """Identity of what is carried over; None when nothing is."""
        contents = [(self.folder / name).read_text(encoding="utf-8") for name in self.templates]
        if not (self.tokenizer_settings or self.generation or self.end_ids or contents):
            return None
        carried = [self.tokenizer_settings, self.generation, self.end_ids, self.templates, contents]
        text = json.dumps(carried, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def copy_templates(self, folder: Path) -> None:
        """Copy the chat templates into `folder`."""
        for name in self.templates:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)

    def said(self) -> list[str]:
        """What an export takes from here, one phrase each."""
        phrases = []
        if self.templates or "chat_template" in self.tokenizer_settings:
            phrases.append("the chat template")
        if self.generation:
            phrases.append("the settings of generation")
        if len(self.end_ids) > 1:
            phrases.append(f"the end tokens {', '.join(map(str, self.end_ids))}")
        return phrases


def read_beside(tokenizer: Tokenizer) -> Beside:
    """What lies beside `tokenizer`'s file. ValueError when a file there cannot be read."""
    folder = tokenizer.path.parent
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    generation = _json(folder / _GENERATION)
    generation.pop("transformers_version", None)
    generation.pop("_from_model_config", None)
    ids: dict[int, None] = {}
    for name in (_GENERATION, "config.json"):
        for token_id in _ids(folder / name):
            if not 0 <= token_id < tokenizer.vocabulary_size:
                raise ValueError(
                    f"{folder / name}: eos_token_id {token_id} is no id of {tokenizer.path}, which "
                    f"has {tokenizer.vocabulary_size}"
                )
            ids[token_id] = None
    # The template is text for people and models; other settings of a SentencePiece model's folder
    # are about how transformers would make a tokenizer of it.
    kept = settings if tokenizer.kind == "huggingface" else _only(settings, "chat_template")
    for name in _NOT_CARRIED:
        kept.pop(name, None)
    return Beside(
        folder=folder,
        tokenizer_settings=kept,
        generation={name: v for name, v in generation.items() if not name.endswith("_token_id")},
        end_ids=tuple(ids),
        templates=tuple(_templates(folder)),
    )


def unknown_added_tokens(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Tokens that files in a model's folder add to the vocabulary and `tokenizer` does not have.

    Texts would be split elsewhere than the model was trained with, and their rows never be used.
    """
    added = dict(_json(folder / "added_tokens.json"))
    declared = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for token_id, entry in declared.items():
        content = entry.get("content") if isinstance(entry, dict) else entry
        added[str(content)] = token_id
    id_of = (
        tokenizer.backend.piece_to_id
        if tokenizer.kind == "sentencepiece"
        else tokenizer.backend.token_to_id
    )
    return [
        f"{content!r} ({token_id})"
        for content, token_id in added.items()
        if id_of(content) != int(token_id)
    ]


def _templates(folder: Path) -> Iterator[str]:
    yield from (name for name in TEMPLATES if (folder / name).is_file())
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        yield f"{TEMPLATE_FOLDER}/{path.name}"


def _ids(path: Path) -> list[int]:
    given = _json(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [given]
    return [token_id for token_id in ids if isinstance(token_id, int)]


def _only(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: settings[name]} if name in settings else {}


def _json(path: Path) -> dict[str, Any]:
    """The content of a file of JSON; empty when there is none. ValueError when it is no object."""
    return json_object(path) if path.is_file() else {}
