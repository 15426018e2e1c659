"""The fingerprint of a file's content."""

import hashlib
from pathlib import Path

READ_BYTES = 1 << 20


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, hex; what `sha256sum` prints. hashlib.file_digest needs Python
    3.11.
    """
    state = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            state.update(block)
    return state.hexdigest()
