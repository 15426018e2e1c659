"""Write a file so that its name holds the old content or all of the new, even across a power cut."""

import json
import os
from pathlib import Path
from typing import Any


def write_json_atomically(path: str | Path, obj: Any) -> None:
    """Write `obj` as JSON. OSError when it cannot be written; the old file then stands."""
    write_text_atomically(
        path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8. OSError when it cannot be written; the old file then stands."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
