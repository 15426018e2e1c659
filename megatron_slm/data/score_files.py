"""The files of a score store: laid out empty, written in place, and known by their stamps. No
torch.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.score_manifest import ScoreManifest
from megatron_slm.files.atomic import sync_path, write_json_atomically


def lay_out(folder: Path, manifest: ScoreManifest) -> None:
    """Make an empty store under a temporary name and rename it to `folder`.

    When another process renames its own first, that one is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        (temporary / "shards").mkdir(parents=True)
        for name in manifest.columns:
            with open(column_path(temporary, name), "wb") as stream:
                stream.truncate(_column_bytes(manifest))
                os.fsync(stream.fileno())
        write_json_atomically(
            temporary / "manifest.json", replace(manifest, complete=False).to_json()
        )
        os.rename(temporary, folder)
        sync_path(folder.parent)
    except OSError:
        if not (folder / "manifest.json").exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def column_path(folder: Path, column: str) -> Path:
    """The file that holds one column."""
    return folder / f"{column}.bin"


def _column_bytes(manifest: ScoreManifest) -> int:
    return manifest.corpus_tokens * manifest.numpy_dtype.itemsize


def write_values(path: Path, start: int, values: np.ndarray) -> None:
    """Write `values` as the entries of a column from `start` on, and fsync them."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        left = values.data.cast("B")
        offset_bytes = start * values.itemsize
        while left:
            written_bytes = os.pwrite(descriptor, left, offset_bytes)
            left = left[written_bytes:]
            offset_bytes += written_bytes
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_sizes(folder: Path, manifest: ScoreManifest) -> None:
    """ValueError unless every column has exactly one value per token of the corpus."""
    expected_bytes = _column_bytes(manifest)
    for name in manifest.columns:
        path = column_path(folder, name)
        size_bytes = path.stat().st_size if path.exists() else None
        if size_bytes != expected_bytes:
            size = "the file is missing" if size_bytes is None else f"{size_bytes} bytes"
            raise ValueError(
                f"{path}: {size}, expected {expected_bytes} bytes ({manifest.corpus_tokens} tokens "
                f"in {manifest.dtype}). Copy the store again, or score again."
            )


def stamps(folder: Path, columns: Iterable[str], missing: Iterable[int]) -> dict[str, Any]:
    """Sizes, times and inodes of the columns, which change when a column is written to or replaced,
    and the shards that are missing.
    """
    of_columns = {}
    for name in columns:
        status = column_path(folder, name).stat()
        of_columns[name] = [
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        ]
    return {"columns": of_columns, "missing": sorted(missing)}


def verified_stamps(folder: Path) -> dict[str, Any] | None:
    """The stamps that the columns had when their content was last verified; None = not known."""
    try:
        return json.loads((folder / "verified.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def note_verified(folder: Path, verified: dict[str, Any]) -> None:
    """Note the stamps of verified columns. In a folder that cannot be written, nothing is noted:
    the next opening hashes the columns again.
    """
    with contextlib.suppress(OSError):
        write_json_atomically(folder / "verified.json", verified)
