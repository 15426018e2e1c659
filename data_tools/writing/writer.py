"""The writer of a corpus: it appends to PREFIX.partial/, saves its progress, and publishes.

PREFIX.partial/ holds tokens.bin, lengths.i32, rejects.jsonl, hashes.bin and progress.json.
progress.json is replaced after the others have reached the disk. Whatever is longer than recorded
there was written after the last save, and is cut off when a run continues. A killed run therefore
continues exactly, and ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.file_array import FileArray, open_array
from megatron_slm.data.indexed import write_index
from megatron_slm.data.manifest import CorpusManifest, manifest_path
from megatron_slm.files.atomic import sync_path, write_json_atomically
from megatron_slm.files.folder_lock import FolderLock
from megatron_slm.files.made_from import ChangedFile, origin_error

_STREAMS = ("tokens.bin", "lengths.i32", "rejects.jsonl", "hashes.bin")
_FINISHED = "finished.json"
_PROGRESS = "progress.json"
UNFINISHED = (_PROGRESS, _FINISHED)
"""Files of PREFIX.partial/ that a run can be continued from."""
_COPY_BYTES = 8 << 20


def existing_output(prefix: str) -> list[Path]:
    """The files of a corpus that already stand under this prefix."""
    return [
        path
        for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), manifest_path(prefix))
        if path.exists()
    ]


def lock_of_partial_folder(folder: Path) -> FolderLock:
    """The lock of PREFIX.partial/: one program at a time writes a corpus."""
    return FolderLock(
        folder,
        "another run",
        "Wait until it is done, or end it and start this command again; or give another output "
        "prefix",
    )


def write_index_file(path: Path, dtype: np.dtype, lengths_tokens: FileArray) -> str:
    """Write the .idx of documents with these lengths to the disk; returns its sha256."""
    sha256 = hashlib.sha256()
    with open(path, "wb", buffering=1 << 20) as stream:
        write_index(stream, dtype, lengths_tokens, sha256.update)
        stream.flush()
        os.fsync(stream.fileno())
    return sha256.hexdigest()


class CorpusWriter:
    """Append documents, save progress, finish.

    A context manager; leaving it early keeps what was saved.
    """

    def __init__(
        self, prefix: str, dtype: np.dtype, identity: dict[str, Any], *, restart: bool = False
    ) -> None:
        self.prefix = prefix
        self._dtype = np.dtype(dtype)
        self._identity = identity
        self.folder = Path(f"{prefix}.partial")
        self._lock = lock_of_partial_folder(self.folder)
        self._restart = restart
        self._streams: dict[str, BufferedWriter] = {}
        self._sha256 = hashlib.sha256()
        self.documents = 0
        self.tokens = 0
        self.state: dict[str, Any] | None = None
        """What was given to the last `save` of an interrupted run; None when starting anew."""
        self.published: CorpusManifest | None = None
        """The corpus of a run that was killed while it moved finished files out.

        Entering the context has moved the rest out.
        """

    def __enter__(self) -> CorpusWriter:
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        progress_path = self.folder / _PROGRESS
        progress = None
        if (self.folder / _FINISHED).exists():
            self.published = self._publish()
            return
        if self._restart:
            progress_path.unlink(missing_ok=True)
        elif progress_path.exists():
            progress = json.loads(progress_path.read_text(encoding="utf-8"))
            if progress["identity"] != self._identity:
                raise origin_error(
                    f"{self.folder} holds an unfinished run with other inputs or options:",
                    progress["identity"],
                    self._identity,
                    "this run",
                    "Give the same inputs and options to continue it, or --restart to throw it "
                    "away and begin anew.",
                )
        for stray in self.folder.glob("spill-*"):
            stray.unlink()
        sizes = progress["sizes"] if progress else dict.fromkeys(_STREAMS, 0)
        for name in _STREAMS:
            stream = open(self.folder / name, "ab")  # noqa: SIM115  closed by __exit__
            self._streams[name] = stream
            if stream.tell() < sizes[name]:
                raise ChangedFile(
                    f"{self.folder / name} is shorter than the saved progress says. Delete the "
                    "folder, or give --restart, to begin anew."
                )
            stream.truncate(sizes[name])
            stream.seek(0, os.SEEK_END)
        if progress:
            self.state = progress["state"]
            self.documents = progress["documents"]
            self.tokens = sizes["tokens.bin"] // self._dtype.itemsize
            with open(self.folder / "tokens.bin", "rb") as written:
                while piece := written.read(_COPY_BYTES):
                    self._sha256.update(piece)

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            with contextlib.suppress(OSError):  # the disk is full: what was saved is kept
                stream.close()
        self._lock.release()

    def append(self, tokens: bytes) -> None:
        """Add tokens of whole documents, whose lengths go to `add_documents`."""
        self._streams["tokens.bin"].write(tokens)
        self._sha256.update(tokens)
        self.tokens += len(tokens) // self._dtype.itemsize

    def add_documents(self, lengths_tokens: np.ndarray, hashes: bytes = b"") -> None:
        self._streams["lengths.i32"].write(lengths_tokens.astype("<i4", copy=False).tobytes())
        self._streams["hashes.bin"].write(hashes)
        self.documents += len(lengths_tokens)

    def append_file(self, path: str | Path) -> None:
        """As `append`, for the tokens in a file."""
        with open(path, "rb") as stream:
            while piece := stream.read(_COPY_BYTES):
                self.append(piece)

    def add_reject(self, reject: dict[str, Any]) -> None:
        self._streams["rejects.jsonl"].write(json.dumps(reject, ensure_ascii=True).encode() + b"\n")

    def saved_hashes(self) -> bytes:
        return (self.folder / "hashes.bin").read_bytes()

    def save(self, state: dict[str, Any]) -> None:
        """Make everything appended so far survive a kill, with `state` to continue from."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        write_json_atomically(
            self.folder / _PROGRESS,
            {
                "identity": self._identity,
                "documents": self.documents,
                "sizes": {name: stream.tell() for name, stream in self._streams.items()},
                "state": state,
            },
        )

    def lengths_tokens(self) -> FileArray:
        """Lengths of all documents so far, read from disk on access."""
        self._streams["lengths.i32"].flush()
        return open_array(self.folder / "lengths.i32", np.dtype("<i4"))

    def finish(
        self,
        make_manifest: Callable[..., CorpusManifest],
        side_files: dict[str, Callable[[Path], None]],
    ) -> CorpusManifest:
        """Write the index, move everything to its final name (the manifest last), remove the
        folder.

        `make_manifest` gets documents, tokens, token_dtype, sizes and checksums. `side_files` maps
        a suffix to a function that writes that file at the path it is given.
        """
        index_path = self.folder / "corpus.idx"
        index_sha256 = write_index_file(index_path, self._dtype, self.lengths_tokens())
        manifest = make_manifest(
            documents=self.documents,
            tokens=self.tokens,
            token_dtype=self._dtype.name,
            bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=index_path.stat().st_size,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=index_sha256,
        )
        moves = {"tokens.bin": ".bin", "corpus.idx": ".idx"}
        for suffix, write in side_files.items():
            write(self.folder / suffix.lstrip("."))
            moves[suffix.lstrip(".")] = suffix
        if self._streams["rejects.jsonl"].tell():
            moves["rejects.jsonl"] = ".rejects.jsonl"
        else:
            Path(f"{self.prefix}.rejects.jsonl").unlink(missing_ok=True)
        write_json_atomically(
            self.folder / _FINISHED, {"moves": moves, "manifest": manifest.to_json()}
        )
        return self._publish()

    def _publish(self) -> CorpusManifest:
        """Move the finished files out; repeated after a kill, it does what is left.

        Until the manifest is written there is none under the prefix, which every reader takes for
        an unfinished corpus.
        """
        finished = json.loads((self.folder / _FINISHED).read_text(encoding="utf-8"))
        manifest = CorpusManifest.from_json(finished["manifest"])
        for stale in (manifest_path(self.prefix), Path(f"{self.prefix}.verified.json")):
            stale.unlink(missing_ok=True)
        for name, suffix in finished["moves"].items():
            if (self.folder / name).exists():
                os.replace(self.folder / name, f"{self.prefix}{suffix}")
        sync_path(Path(self.prefix).parent)
        manifest.write(self.prefix)
        # In this order: a kill between the two leaves a publication that can be repeated.
        for name in (_PROGRESS, _FINISHED):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        return manifest
