"""The note in a folder that export_hf wrote: which file in it is the vocabulary of the model's
corpora.

tokenizer.json of an export is often a rewritten form of that, with the same ids and other bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_slm.files.atomic import write_json_atomically

EXPORT_NOTE = "megatron_slm.json"
EXPORTED_FILES = ("tokenizer.json", "tokenizer.model", "corpus_tokenizer.json")
"""What the vocabulary of the corpora is called in an exported model's folder."""


def write_export_note(folder: Path, tokenizer_file: str, prepend_bos: bool | None) -> None:
    """Write the note, after tokenizer.json; prepend_bos None = not known."""
    written = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    note = {
        "tokenizer_file": tokenizer_file,
        "tokenizer_json_sha256": written,
        "prepend_bos": prepend_bos,
    }
    write_json_atomically(folder / EXPORT_NOTE, note)


def read_export_note(folder: Path) -> dict[str, Any] | None:
    """tokenizer_file and prepend_bos of a folder that export_hf wrote; None for another's folder.

    ValueError: the note is damaged, or the tokenizer.json is no longer the one it was written for.
    """
    path = folder / EXPORT_NOTE
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        name = note["tokenizer_file"]
        noted = note["tokenizer_json_sha256"]
        actual = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable note of export_hf ({error!r})") from None
    if name not in EXPORTED_FILES or not (folder / name).is_file():
        raise ValueError(f"{path}: names the tokenizer {name!r}, which is no file of an export")
    if note.setdefault("prepend_bos", None) not in (None, True, False):
        raise ValueError(f"{path}: prepend_bos is {note['prepend_bos']!r}, not true, false or null")
    if actual != noted:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has changed since export_hf wrote it, so {name} may no "
            "longer be the same vocabulary; name the file that is meant"
        )
    return note
