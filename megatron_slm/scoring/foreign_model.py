"""The identity of a model folder that is not ours, read without torch."""

import hashlib
from pathlib import Path

from megatron_slm.files.hashing import file_sha256


def huggingface_fingerprint(folder: str | Path) -> str:
    """The identity of a local model folder: its weights and its config."""
    folder = Path(folder)
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )
    if not any(path.suffix != ".json" for path in files) or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no local Hugging Face model: it needs config.json and its weights (*.safetensors or *.bin)"
        )
    return (
        "sha256:"
        + hashlib.sha256(
            "\n".join(f"{path.name} {file_sha256(path)}" for path in files).encode()
        ).hexdigest()
    )
