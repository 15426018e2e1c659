"""A corpus for the preprocessing benchmark, from what is installed on this machine."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp")
LONGEST_CHARACTERS = 300_000


def make_corpus(path: str, wanted_bytes: int) -> None:
    """jsonl of installed sources and documentation: every text once, packages mixed."""
    written = 0
    documents = 0
    with open(path, "w", encoding="utf-8") as out:
        for text in _texts():
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
            written += len(text)
            if written >= wanted_bytes:
                break
    print(f"{path}: {documents} documents, {written / 1e6:.1f} MB")


def _texts() -> Iterator[str]:
    seen = set()
    for file in sorted(_files(), key=_mixed_order):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not text.strip() or "\0" in text or len(text) > LONGEST_CHARACTERS:
            continue
        if hash(text) not in seen:
            seen.add(hash(text))
            yield text


def _files() -> Iterator[Path]:
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for root in {*installed, "/usr/share/doc", "/usr/include"}:
        for folder, _, names in os.walk(root):
            for name in names:
                if name.endswith(ENDINGS):
                    yield Path(folder, name)


def _mixed_order(file: Path) -> bytes:
    return hashlib.md5(str(file).encode()).digest()
