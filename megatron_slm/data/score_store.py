"""The score store: one number per token of a corpus, at the token's absolute offset. No torch.

    STORE/manifest.json            what the scores belong to, and how they were made (score_manifest.py)
    STORE/<column>.bin             raw little-endian fp16 or fp32, exactly one value per token of the corpus's .bin
    STORE/shards/shard_000007.json one marker per finished shard, with a sha256 per column

`score[i] = -log p(token_i | context before i)`: the value lies under the token it scores, so the labels of a training
sample and their scores are the same slice. NaN = no score. Because the key is the offset in the corpus, scores outlive any
change of sequence length, shuffling, blend or batch.

Several processes, or several jobs, write different shards at once: each write touches only its own bytes, and a shard
counts from the moment its marker is renamed into place, after its bytes have reached the disk. A killed job loses its
unfinished shard only, and that shard written again gives the same bytes.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megatron_slm.data.file_array import FileArray, ReadOnlyFile
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_manifest import (
    ScoreManifest,
    ShardMarker,
    finished_shards,
    presented_name,
    sha256_of,
)
from megatron_slm.files.atomic import sync_path, write_json_atomically


class ScoreStore:
    """Read and write one store. Make it with `create` (also joins one that is being written) or `open`.

    Pickles by its folder, so data workers can carry it.
    """

    def __init__(self, folder: Path, manifest: ScoreManifest, missing: frozenset[int]):
        self.folder = folder
        self.manifest = manifest
        self.missing = missing
        """Shards without a marker, as last seen by this process; their tokens read as NaN."""
        self._opened: dict[str, FileArray] = {}

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}

    @classmethod
    def create(cls, folder: str | Path, manifest: ScoreManifest) -> "ScoreStore":
        """A store of these settings at `folder`, with its files at full size; joins it when it is already there.

        Any number of processes may call it at once with the same manifest. A store with other settings is left alone:
        ValueError names what differs.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            if not (folder.exists() and any(folder.iterdir())):
                _lay_out(folder, manifest)
            elif not (
                folder / "manifest.json"
            ).exists():  # asked again: another process may have laid the store out in between
                raise ValueError(
                    f"{folder} exists, is not empty and is no score store; give another --output."
                )
        there = ScoreManifest.from_json(folder / "manifest.json")
        if differences := there.differences(manifest):
            raise ValueError(
                f"{folder} already holds scores made in another way: "
                + "; ".join(differences)
                + ". Write to another folder, or delete this one."
            )
        return cls(folder, there, _missing_shards(folder, there))

    @classmethod
    def open(cls, folder: str | Path, *, allow_missing_scores: bool = False) -> "ScoreStore":
        """A store to read. Sizes are checked; content is hashed when a file's stamp is not the one last verified.

        A store with unfinished shards is refused (ValueError names the missing token ranges and says
        how to complete it), unless `allow_missing_scores`: then those tokens read as NaN and cannot be
        selected.
        """
        folder = Path(folder)
        manifest = ScoreManifest.from_json(folder / "manifest.json")
        store = cls(folder, manifest, _missing_shards(folder, manifest))
        store._check_sizes()
        if store.missing and not allow_missing_scores:
            raise ValueError(store.describe_missing())
        if store._remembered_stamps() != store._stamps():
            store.verify()
            store._remember_stamps()
        return store

    @property
    def columns(self) -> tuple[str, ...]:
        return self.manifest.columns

    @property
    def presented_columns(self) -> tuple[str, ...]:
        """The columns under the names scorers know: reference_loss for loss, reference_entropy for entropy."""
        return tuple(presented_name(column) for column in self.columns)

    def write_shard(self, shard: int, values: Mapping[str, np.ndarray]) -> ShardMarker:
        """Put one shard's values in place, durably, then mark it finished.

        values: every column of the store, one value per token of the shard, any float dtype; infinities become NaN
        (a token the reference cannot score has no score). ValueError when a finite value does not fit the store's dtype.
        """
        start, end = self.manifest.shard_range(shard)
        if set(values) != set(self.columns):
            raise ValueError(
                f"Shard {shard} came with the columns {sorted(values)}; this store has {sorted(self.columns)}."
            )
        stored = {
            name: self._stored(name, np.asarray(values[name]), end - start) for name in self.columns
        }
        for name, array in stored.items():
            self._write_durably(name, start, array)
        marker = ShardMarker.describe(shard, start, end, stored)
        write_json_atomically(ShardMarker.path(self.folder, shard), asdict(marker))
        self.missing -= {shard}
        return marker

    def finish(self) -> bool:
        """When every shard is there: hash everything once more from disk and mark the store complete. False otherwise.

        Safe to call from every process that wrote, at any time.
        """
        self.missing = _missing_shards(self.folder, self.manifest)
        if self.missing:
            return False
        self._check_sizes()
        self.verify()
        self._remember_stamps()
        self.manifest = replace(self.manifest, complete=True)
        write_json_atomically(self.folder / "manifest.json", self.manifest.to_json())
        return True

    def read(self, column: str, start: int, count: int) -> np.ndarray:
        """fp32 copies of `count` values from absolute token offset `start`."""
        if start < 0 or count < 0 or start + count > self.manifest.corpus_tokens:
            raise ValueError(
                f"Tokens {start} to {start + count} are not in this store: it has {self.manifest.corpus_tokens}."
            )
        return self.read_pieces(column, [(start, start + count)])

    def read_pieces(self, column: str, pieces: list[tuple[int, int]]) -> np.ndarray:
        """fp32 values of the token ranges [start, end) back to back: the pieces of documents that make up one sample."""
        read = self._values(column).read_pieces(pieces).astype(np.float32)
        if self.missing:
            shards = np.concatenate(
                [np.arange(start, end) // self.manifest.shard_tokens for start, end in pieces]
            )
            read[np.isin(shards, list(self.missing))] = np.nan
        return read

    def check_unchanged(self) -> None:
        """UnreadableFile when a column was written to since it was opened for reading."""
        for array in self._opened.values():
            array.file.check_unchanged()

    def verify(
        self, first_tokens: np.ndarray | None = None, shards: Iterable[int] | None = None
    ) -> dict[str, int]:
        """Check finished shards against their markers; the number of tokens without a score, per
        column.

        first_tokens: sorted offsets of the first token of every document; with it, tokens without a
        score beyond those are returned instead. shards: which to check; None = every one that is
        finished. ValueError names a shard whose bytes, range or columns are not what its marker
        says.
        """
        without = dict.fromkeys(self.columns, 0)
        wanted = range(self.manifest.shard_count) if shards is None else shards
        for shard in sorted(set(wanted) - self.missing):
            marker = ShardMarker.read(self.folder, shard)
            if (marker.shard, marker.start, marker.end) != (
                shard,
                *self.manifest.shard_range(shard),
            ) or set(marker.sha256) != set(self.columns):
                raise ValueError(
                    f"{ShardMarker.path(self.folder, shard)} does not describe shard {shard} of this store. {self._redo(shard)}"
                )
            for name in self.columns:
                values = self._values(name)[marker.start : marker.end]
                if sha256_of(values) != marker.sha256[name]:
                    raise ValueError(
                        f"{self.column_path(name)}: the scores of tokens {marker.start:,} to {marker.end:,} (shard {shard}) "
                        f"are not the bytes that were written. {self._redo(shard)}"
                    )
                without_value = np.isnan(values)
                if first_tokens is not None:
                    low, high = np.searchsorted(first_tokens, (marker.start, marker.end))
                    without_value[first_tokens[low:high] - marker.start] = False
                without[name] += int(without_value.sum())
        return without

    def check_against(self, corpus: CorpusManifest) -> None:
        """ValueError unless these scores are of exactly this corpus and its tokenizer."""
        problems = []
        for what, got, wanted in (
            ("tokens", self.manifest.corpus_tokens, corpus.tokens),
            ("documents", self.manifest.corpus_documents, corpus.documents),
            ("corpus fingerprint", self.manifest.corpus_fingerprint, corpus.fingerprint),
            (
                "tokenizer fingerprint",
                self.manifest.tokenizer_fingerprint,
                corpus.tokenizer["fingerprint"],
            ),
        ):
            if got != wanted:
                problems.append(f"{what}: the scores have {got}, the training data {wanted}")
        if problems:
            raise ValueError(
                f"The scores in {self.folder} are of another corpus or tokenizer. "
                + "; ".join(problems)
                + ". Score this corpus again: torchrun -m megatron_slm.score --checkpoint RUN --corpus C --output S"
            )

    def context_warnings(self, sequence_length: int, document_policy: str = "packed") -> list[str]:
        """Ways in which the context a token was scored in differs from the one it is trained in.

        docs/method.md#point-13
        """
        warnings = []
        if self.manifest.window_tokens != sequence_length:
            warnings.append(
                f"{self.folder}: tokens were scored in windows of {self.manifest.window_tokens} tokens and are trained in "
                f"sequences of {sequence_length}: the excess loss compares different contexts. Score again with "
                f"--window-tokens {sequence_length} to remove the difference."
            )
        if self.manifest.document_policy != document_policy:
            scored, trained = (
                {
                    "packed": "packed, where a token also sees the document before its own",
                    "isolated": "isolated, where it sees its own only",
                }[policy]
                for policy in (self.manifest.document_policy, document_policy)
            )
            warnings.append(
                f"{self.folder}: documents were scored {scored}, and are trained {trained}: the excess loss compares different contexts. Score again "
                f"with --document-policy {document_policy}, or train with --data.document_policy {self.manifest.document_policy}, to compare like with like."
            )
        return warnings

    def missing_ranges(self) -> list[tuple[int, int]]:
        """Token ranges [start, end) without scores, adjacent shards joined."""
        ranges: list[tuple[int, int]] = []
        for start, end in map(self.manifest.shard_range, sorted(self.missing)):
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
        return ranges

    def describe_missing(self) -> str:
        ranges = [f"{start:,} to {end:,}" for start, end in self.missing_ranges()]
        listed = ", ".join(ranges[:5]) + (
            f" and {len(ranges) - 5} more ranges" if len(ranges) > 5 else ""
        )
        return (
            f"The scores in {self.folder} are incomplete: {len(self.missing)} of {self.manifest.shard_count} shards are missing, tokens "
            f"{listed}. Complete them: {self._made_by()} (finished shards are kept); "
            "or set selection.reference.allow_missing_scores to train without selecting those tokens."
        )

    def column_path(self, column: str) -> Path:
        return self.folder / f"{column}.bin"

    def _values(self, column: str) -> FileArray:
        if column not in self.columns:
            raise ValueError(
                f"{self.folder} has no column {column!r}; it has {', '.join(self.columns)}."
            )
        if column not in self._opened:
            self._opened[column] = FileArray(
                ReadOnlyFile(self.column_path(column)),
                self.manifest.numpy_dtype,
                self.manifest.corpus_tokens,
            )
        return self._opened[column]

    def _stored(self, name: str, values: np.ndarray, count: int) -> np.ndarray:
        if values.shape != (count,):
            raise ValueError(
                f"Column {name!r} came with shape {values.shape}; this shard has {count} tokens."
            )
        values = np.where(np.isfinite(values), values, np.nan)
        with np.errstate(over="ignore"):
            stored = values.astype(self.manifest.numpy_dtype)
        if np.isinf(stored).any():
            raise ValueError(
                f"Column {name!r} has a value of {np.nanmax(np.abs(values))}, too large for {self.manifest.dtype}; "
                "make the store with --dtype fp32."
            )
        stored[np.isnan(stored)] = (
            np.nan
        )  # one bit pattern for NaN, so that equal scores are equal bytes
        return stored

    def _write_durably(self, name: str, start: int, array: np.ndarray) -> None:
        descriptor = os.open(self.column_path(name), os.O_WRONLY)
        try:
            view, position = memoryview(array).cast("B"), start * array.itemsize
            while view:
                written = os.pwrite(descriptor, view, position)
                view, position = view[written:], position + written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _check_sizes(self) -> None:
        expected = self.manifest.corpus_tokens * self.manifest.numpy_dtype.itemsize
        for name in self.columns:
            path = self.column_path(name)
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                raise ValueError(
                    f"{path}: {'the file is missing' if size is None else f'{size} bytes'}, expected {expected} bytes "
                    f"({self.manifest.corpus_tokens} tokens in {self.manifest.dtype}). Copy the store again, or score again."
                )

    def _redo(self, shard: int) -> str:
        return (
            f"Copy the store again, or delete {ShardMarker.path(self.folder, shard)} and score again: {self._made_by()}; only "
            "that shard is redone."
        )

    def _made_by(self) -> str:
        """How to go on with the store.

        Its command is not printed: whoever made the store wrote it, and people run what they are told.
        """
        return (
            f"run the command that made them again, with --output {self.folder} (resume_command in its manifest.json keeps it; "
            "read it before you run it)"
        )

    def _stamps(self) -> dict:
        status = {name: self.column_path(name).stat() for name in self.columns}
        stamps = {
            name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in status.items()
        }
        return {"columns": stamps, "missing": sorted(self.missing)}

    def _remembered_stamps(self) -> dict | None:
        try:
            return json.loads((self.folder / "verified.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _remember_stamps(self) -> None:
        with contextlib.suppress(OSError):  # a read-only folder: the next opening hashes again
            write_json_atomically(self.folder / "verified.json", self._stamps())


def _missing_shards(folder: Path, manifest: ScoreManifest) -> frozenset[int]:
    return frozenset(range(manifest.shard_count)) - finished_shards(folder)


def _lay_out(folder: Path, manifest: ScoreManifest) -> None:
    """Make an empty store under a temporary name and rename it into place; losing that race to another process is fine."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        (temporary / "shards").mkdir(parents=True)
        for name in manifest.columns:
            with open(temporary / f"{name}.bin", "wb") as stream:
                stream.truncate(manifest.corpus_tokens * manifest.numpy_dtype.itemsize)
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
