"""Write a file so that its name holds the old content or all of the new, even after a power cut."""

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
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | Path, content: bytes) -> None:
    """Write `content`. OSError when it cannot be written; the old file then stands."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_json(
    path: str | Path,
    content: Any,
    *,
    indent: int = 2,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
) -> None:
    """Write `content` as JSON and fsync it.

    Not atomic: only for a file in a folder that gets its name later, by a rename.
    """
    text = json.dumps(content, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_path(path: str | Path) -> None:
    """fsync a file; or a folder, so that the names and renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
