"""Whether a Hugging Face model folder may be written or can be read, before torch is loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.beside_tokenizer import read_beside, unknown_added_tokens
from megatron_slm.convert.folder_kinds import other_kind
from megatron_slm.convert.hf_settings import model_config
from megatron_slm.files.export_note import read_export_note
from megatron_slm.files.made_from import ChangedFile, refuse_other_origin
from megatron_slm.files.plain import json_object
from megatron_slm.tokenization import Tokenizer, load_tokenizer

LAST_FILE = "config.json"
"""Written last: a folder that has it is a complete export."""
MADE_FROM = "made_from.json"
"""In an export: what it was made from, and the sizes of its files."""
CARD = "README.md"
"""In an export: the model card, which its user completes."""


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder that can be imported, as its small files describe it."""

    folder: Path
    model_type: str
    """Its family."""
    model: ModelConfig
    sequence_length: int
    tokenizer: Tokenizer
    prepend_bos: bool | None
    """Whether the corpora's documents begin with the begin-of-text token; known only for our own
    exports."""

    def made_from(self, dtype: str) -> dict[str, str]:
        """What an import of it is made from."""
        return origin_of_import(self.folder, self.tokenizer, dtype)


def open_model_folder(folder: Path, tokenizer_path: str = "") -> ModelFolder:
    """ValueError names what cannot be read in the folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json in it{other_kind(folder)}")
    config = read_config(folder)
    try:
        model, sequence_length = model_config(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    tokenizer = load_tokenizer(tokenizer_path or folder)
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocabulary_size} ids, the model's embedding only "
            f"{model.vocabulary_size}; give its own --tokenizer"
        )
    read_beside(tokenizer)  # an export will want it: what cannot be read is said now
    if unknown := unknown_added_tokens(folder, tokenizer):
        raise ValueError(
            f"{folder}: added_tokens.json or tokenizer_config.json adds {', '.join(unknown[:4])}, "
            f"which {tokenizer.path} does not have under that id; open the folder with "
            "transformers' AutoTokenizer and save it, which writes them into tokenizer.json"
        )
    note = None if tokenizer_path else read_export_note(folder)
    prepend_bos = None if note is None else note["prepend_bos"]
    return ModelFolder(folder, config["model_type"], model, sequence_length, tokenizer, prepend_bos)


def origin_of_import(folder: Path, tokenizer: Tokenizer, dtype: str) -> dict[str, str]:
    """What decides an import, to find out whether it was done before."""
    return {
        "files": files_fingerprint(folder),
        "dtype": dtype,
        "tokenizer": tokenizer.fingerprint,
    }


def made_from_note(folder: Path, made_from: dict) -> dict:
    """The content of MADE_FROM for the export in `folder`, whose files are all there but for
    MADE_FROM and LAST_FILE.
    """
    return {"made_from": made_from, "bytes": _sizes_bytes(folder)}


def exported_before(output: Path, now: dict) -> bool:
    """Whether `output` is a whole export that was made from `now`.

    ValueError when it is one of something else, ChangedFile when it has changed.
    """
    if not (output / MADE_FROM).exists() or not (output / LAST_FILE).exists():
        return False
    note = json_object(output / MADE_FROM)
    advice = "Give --overwrite to replace it, or another --output."
    refuse_other_origin(output, note.get("made_from"), now, advice)
    if note.get("bytes") != _sizes_bytes(output):
        raise ChangedFile(f"{output} has changed since it was exported. {advice}")
    return True


def _sizes_bytes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MADE_FROM, LAST_FILE, CARD)
    }


def files_fingerprint(folder: Path) -> str:
    """Identity of the files in a folder: names, sizes and modification times; reading models whole
    would take minutes.
    """
    state = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        status = path.stat()
        state.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return "sha256:" + state.hexdigest()


def check_output(output: Path, overwrite: bool) -> None:
    """ValueError unless `output` is free, or is an earlier export that may be replaced."""
    if not output.exists():
        return
    content = [path.name for path in output.iterdir()] if output.is_dir() else [output.name]
    if content and not overwrite:
        raise ValueError(
            f"{output} already holds {', '.join(sorted(content)[:3])}; give another --output, or "
            "--overwrite to replace an earlier export"
        )
    if content and MADE_FROM not in content:
        raise ValueError(
            f"{output} is no folder that export_hf wrote (no {MADE_FROM} in it), so --overwrite "
            "will not remove it; give another --output"
        )


def read_config(folder: Path) -> dict:
    """config.json of a Hugging Face model's folder. ValueError when it cannot be read."""
    try:
        return json_object(folder / "config.json")
    except ValueError as error:
        raise ValueError(f"{error}; expected the config.json of a Hugging Face model") from None
