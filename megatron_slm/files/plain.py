"""Files that a stranger may have made: only plain files that lie in the folder itself are opened.
No torch.

A list of names that comes with a folder (checksums, a map of shards) could otherwise lead to any
file of the machine, and a link or a device in the folder (/dev/zero) to one that never ends.
"""

import json
import stat
from pathlib import Path
from typing import Any


class LeadsOutside(ValueError):
    """A name leads out of the folder that it came with."""


def shown(text: object, characters: int = 120) -> str:
    """Text from a stranger's file, made fit for a message: cut to a length, with control
    characters, which could move the cursor of a terminal, escaped.
    """
    text = str(text)
    text = text if len(text) <= characters else f"{text[:characters]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_plain_name(name: object) -> bool:
    """Whether the name is that of an entry of a folder: not empty, no separator, no `..`."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )


def plain_file(folder: str | Path, name: str) -> Path:
    """The path of a file of `folder`.

    ValueError unless it is a plain file (no link, device or pipe) in the folder itself.
    """
    if not is_plain_name(name):
        raise LeadsOutside(
            f"{folder}: {shown(repr(name))} leads out of the folder; only its own files are read"
        )
    path = Path(folder) / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{path}: is no plain file (a link, a device or a folder), so it is not read; copy "
            "the file itself there"
        )
    return path


def read_json_object(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in one plain file of `folder`.

    ValueError when it cannot be read, or is something else.
    """
    return json_object(plain_file(folder, name))


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may be a link, as those of a download often are.

    ValueError when it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a flipped byte may be no UTF-8
        raise ValueError(f"{path}: not readable ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
