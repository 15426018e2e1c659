"""A Hugging Face model folder before anything of it is loaded: may it be written, can it be read; no torch."""

import json
from pathlib import Path

LAST_FILE = "config.json"
"""Written last: a folder that has it is a complete export."""


def check_output(output: Path, overwrite: bool) -> None:
    """ValueError unless `output` is free, or is an earlier export that may be replaced."""
    if not output.exists():
        return
    content = [path.name for path in output.iterdir()] if output.is_dir() else [output.name]
    if content and not overwrite:
        raise ValueError(
            f"{output} already holds {', '.join(sorted(content)[:3])}; give another --output, or --overwrite to replace an earlier export"
        )
    if content and LAST_FILE not in content:
        raise ValueError(
            f"{output} is not a model folder (no {LAST_FILE} in it), so --overwrite will not remove it; give another --output"
        )


def read_json(path: Path) -> dict:
    """ValueError when the file is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not readable ({error}); expected the config.json of a Hugging Face model"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
