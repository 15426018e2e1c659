"""Copying parts of finished corpora into a new one: what merging and splitting have in common.

Tokens move from file to file as bytes; no token becomes a Python object. The new corpus is written
to a folder of its own. Its checksum, and that of every source, are computed on the way, so a
damaged source is found before anything is published.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.writing.writer import (
    UNFINISHED,
    existing_output,
    lock_of_partial_folder,
    write_index_file,
)
from megatron_slm.data.file_array import open_array
from megatron_slm.data.manifest import FORMAT_VERSION, CorpusManifest, check_corpus, manifest_path
from megatron_slm.files.atomic import sync_path
from megatron_slm.files.made_from import refuse_other_origin

_COPY_BYTES = 16 << 20
_ADVICE = "Give --overwrite to replace it, or another --output-prefix."


def finished_before(
    prefix: str, program: str, made_from: Callable[[CorpusManifest], Mapping[str, Any]], now: dict
) -> CorpusManifest | None:
    """The corpus under `prefix` when `program` has made it from `now` before; None when there is
    none.

    made_from: returns the origin of the corpus according to its manifest. Raises ValueError when it
    is another corpus, or damaged.
    """
    if not manifest_path(prefix).exists():
        return None
    manifest = CorpusManifest.read(prefix)
    before = made_from(manifest) if manifest.created_by.get("program") == program else None
    refuse_other_origin(f"{prefix}.bin", before, now, _ADVICE)
    return check_corpus(prefix)


class CorpusCopy:
    """A new corpus in PREFIX.partial/, which `finish` publishes.

    A context manager; leaving it early removes the folder.
    """

    def __init__(self, prefix: str, dtype: np.dtype, *, overwrite: bool) -> None:
        existing = existing_output(prefix)
        if existing and not overwrite:
            raise ValueError(f"{existing[0]} exists already. {_ADVICE}")
        self.prefix = prefix
        self._dtype = np.dtype(dtype)
        self._folder = Path(f"{prefix}.partial")
        self._lock = lock_of_partial_folder(self._folder)
        self.documents = 0

    def __enter__(self) -> CorpusCopy:
        self._lock.acquire()
        try:
            unfinished = [name for name in UNFINISHED if (self._folder / name).exists()]
            if unfinished:
                raise ValueError(
                    f"{self._folder} holds an unfinished run of data_tools.preprocess "
                    f"({unfinished[0]}). Let that command finish, delete the folder, or give "
                    "another output prefix."
                )
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        """Begin anew; what a killed run left in the folder is overwritten."""
        # __exit__ closes both.
        self._bin = open(self._folder / "tokens.bin", "wb")  # noqa: SIM115
        self._lengths = open(self._folder / "lengths.i32", "wb")  # noqa: SIM115
        self._sha256 = hashlib.sha256()

    def __exit__(self, *_: object) -> None:
        for stream in (self._bin, self._lengths):
            with contextlib.suppress(OSError):  # a full disk: the folder is removed anyway
                stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()

    def copy_file(self, path: str | Path) -> str:
        """Append the whole token file; returns the sha256 of what was read."""
        state = hashlib.sha256()
        with open(path, "rb", buffering=0) as stream:
            while piece := stream.read(_COPY_BYTES):
                self._bin.write(piece)
                state.update(piece)
                self._sha256.update(piece)
        return state.hexdigest()

    def add_bytes(self, tokens: memoryview | bytes) -> None:
        self._bin.write(tokens)
        self._sha256.update(tokens)

    def add_lengths(self, lengths_tokens: np.ndarray) -> None:
        self._lengths.write(lengths_tokens.astype("<i4").tobytes())
        self.documents += len(lengths_tokens)

    def finish(self, template: CorpusManifest, **changes: Any) -> CorpusManifest:
        """Publish the corpus, with the tokenizer and policies of `template`.

        changes: the other fields of the manifest.
        """
        bin_bytes = self._bin.tell()
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())
        lengths = open_array(self._folder / "lengths.i32", np.dtype("<i4"))
        index_path = self._folder / "corpus.idx"
        index_sha256 = write_index_file(index_path, self._dtype, lengths)
        manifest = CorpusManifest(
            format_version=FORMAT_VERSION,
            documents=self.documents,
            tokens=bin_bytes // self._dtype.itemsize,
            token_dtype=self._dtype.name,
            bin_bytes=bin_bytes,
            idx_bytes=index_path.stat().st_size,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=index_sha256,
            tokenizer=template.tokenizer,
            append_eod=template.append_eod,
            prepend_bos=template.prepend_bos,
            **changes,
        )
        # Without a manifest the prefix counts as unfinished, until the new one is written.
        manifest_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.verified.json").unlink(missing_ok=True)
        os.replace(self._folder / "tokens.bin", f"{self.prefix}.bin")
        os.replace(index_path, f"{self.prefix}.idx")
        sync_path(Path(self.prefix).parent)
        manifest.write(self.prefix)
        return manifest
