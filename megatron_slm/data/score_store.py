"""The score store: one number per token of a corpus, at the token's absolute offset. No torch.

    STORE/manifest.json             what the scores belong to, and how they were made
    STORE/<column>.bin              raw little-endian fp16 or fp32, one value per token
    STORE/shards/shard_000007.json  one marker per finished shard, with a sha256 per column

`score[i] = -log p(token_i | context before i)`: a value has the offset of the token that it scores,
so the labels of a training sample and their scores are the same slice. NaN = no score. Because the
key is the offset in the corpus, scores stay valid under any sequence length, order, blend or batch.

Several processes, or several jobs, write different shards at once: a write touches only its own
bytes, and a shard is finished when its marker is renamed into place, after its bytes have reached
the disk. A killed job loses its unfinished shard only; written again, that shard has the same
bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.file_array import FileArray, ReadOnlyFile
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_context import check_same_corpus, context_differences
from megatron_slm.data.score_files import (
    check_sizes,
    column_path,
    lay_out,
    note_verified,
    stamps,
    verified_stamps,
    write_values,
)
from megatron_slm.data.score_manifest import (
    ScoreManifest,
    ShardMarker,
    finished_shards,
    sha256_of,
)
from megatron_slm.files.atomic import write_json_atomically


class ScoreStore:
    """Read and write one store. Make it with `create`, which also joins a store that is being
    written, or with `open`.

    The open files are not pickled: the receiving process opens them again.
    """

    def __init__(self, folder: Path, manifest: ScoreManifest, missing: frozenset[int]):
        self.folder = folder
        self.manifest = manifest
        self.missing = missing
        """Shards without a marker, as last seen by this process; their tokens read as NaN."""
        self._opened: dict[str, FileArray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    @classmethod
    def create(cls, folder: str | Path, manifest: ScoreManifest) -> "ScoreStore":
        """A store of these settings at `folder`, with its files at full size; an existing one is
        joined.

        Any number of processes may call it at once with the same manifest. A store with other
        settings is left alone: ValueError names what differs.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.exists():
            if not (folder.exists() and any(folder.iterdir())):
                lay_out(folder, manifest)
            elif not path.exists():  # a second look: another process may have laid it out by now
                raise ValueError(
                    f"{folder} exists, is not empty and is no score store; give another --output."
                )
        stored = ScoreManifest.from_json(path)
        if differences := stored.differences(manifest):
            raise ValueError(
                f"{folder} already holds scores made in another way: "
                + "; ".join(differences)
                + ". Write to another folder, or delete this one."
            )
        return cls(folder, stored, _missing_shards(folder, stored))

    @classmethod
    def open(cls, folder: str | Path, *, allow_missing_scores: bool = False) -> "ScoreStore":
        """A store to read. Sizes are checked; content is hashed when a file's stamp is not the one
        that was last verified.

        A store with unfinished shards is refused (ValueError names the missing token ranges and
        says how to complete it), unless `allow_missing_scores`: then those tokens read as NaN and
        cannot be selected.
        """
        folder = Path(folder)
        manifest = ScoreManifest.from_json(folder / "manifest.json")
        store = cls(folder, manifest, _missing_shards(folder, manifest))
        check_sizes(folder, manifest)
        if store.missing and not allow_missing_scores:
            raise ValueError(store.describe_missing())
        if verified_stamps(folder) != stamps(folder, store.columns, store.missing):
            store.verify()
            note_verified(folder, stamps(folder, store.columns, store.missing))
        return store

    @property
    def columns(self) -> tuple[str, ...]:
        return self.manifest.columns

    def write_shard(self, shard: int, values: Mapping[str, np.ndarray]) -> ShardMarker:
        """Put one shard's values in place, durably, then mark it finished.

        values: every column of the store, one value per token of the shard, any float dtype;
        infinities become NaN, which means no score. ValueError when a finite value does not fit the
        store's dtype.
        """
        start, end = self.manifest.shard_range(shard)
        if set(values) != set(self.columns):
            raise ValueError(
                f"Shard {shard} came with the columns {sorted(values)}; this store has "
                f"{sorted(self.columns)}."
            )
        stored = {
            name: self._stored(name, np.asarray(values[name]), end - start) for name in self.columns
        }
        for name, array in stored.items():
            write_values(self.column_path(name), start, array)
        marker = ShardMarker.describe(shard, start, end, stored)
        write_json_atomically(ShardMarker.path(self.folder, shard), asdict(marker))
        self.missing -= {shard}
        return marker

    def finish(self) -> bool:
        """When every shard is finished, hash all of it once more from disk and mark the store
        complete. False when one is not.

        Safe to call from every process that wrote, at any time.
        """
        self.missing = _missing_shards(self.folder, self.manifest)
        if self.missing:
            return False
        check_sizes(self.folder, self.manifest)
        self.verify()
        note_verified(self.folder, stamps(self.folder, self.columns, self.missing))
        self.manifest = replace(self.manifest, complete=True)
        write_json_atomically(self.folder / "manifest.json", self.manifest.to_json())
        return True

    def read(self, column: str, start: int, count: int) -> np.ndarray:
        """fp32 copies of `count` values from absolute token offset `start`."""
        if start < 0 or count < 0 or start + count > self.manifest.corpus_tokens:
            raise ValueError(
                f"Tokens {start} to {start + count} are not in this store: it has "
                f"{self.manifest.corpus_tokens}."
            )
        return self.read_pieces(column, [(start, start + count)])

    def read_pieces(self, column: str, pieces: list[tuple[int, int]]) -> np.ndarray:
        """fp32 values of the token ranges [start, end), back to back."""
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
        without_score = dict.fromkeys(self.columns, 0)
        wanted = range(self.manifest.shard_count) if shards is None else shards
        for shard in sorted(set(wanted) - self.missing):
            marker = self._marker(shard)
            for name in self.columns:
                values = self._values(name)[marker.start : marker.end]
                if sha256_of(values) != marker.sha256[name]:
                    raise ValueError(
                        f"{self.column_path(name)}: the scores of tokens {marker.start:,} to "
                        f"{marker.end:,} (shard {shard}) are not the bytes that were written. "
                        f"{self._redo(shard)}"
                    )
                is_missing = np.isnan(values)
                if first_tokens is not None:
                    low, high = np.searchsorted(first_tokens, (marker.start, marker.end))
                    is_missing[first_tokens[low:high] - marker.start] = False
                without_score[name] += int(is_missing.sum())
        return without_score

    def _marker(self, shard: int) -> ShardMarker:
        marker = ShardMarker.read(self.folder, shard)
        described = (marker.shard, marker.start, marker.end, set(marker.sha256))
        if described != (shard, *self.manifest.shard_range(shard), set(self.columns)):
            raise ValueError(
                f"{ShardMarker.path(self.folder, shard)} does not describe shard {shard} of this "
                f"store. {self._redo(shard)}"
            )
        return marker

    def check_against(self, corpus: CorpusManifest) -> None:
        """ValueError unless these scores are of exactly this corpus and its tokenizer."""
        check_same_corpus(self.folder, self.manifest, corpus)

    def context_warnings(self, sequence_length: int, document_policy: str = "packed") -> list[str]:
        """How the context in which a token was scored differs from the one it is trained in."""
        return context_differences(self.folder, self.manifest, sequence_length, document_policy)

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
        listed = ", ".join(ranges[:5])
        if len(ranges) > 5:
            listed += f" and {len(ranges) - 5} more ranges"
        return (
            f"The scores in {self.folder} are incomplete: {len(self.missing)} of "
            f"{self.manifest.shard_count} shards are missing, tokens {listed}. Complete them: "
            f"{self._made_by()} (finished shards are kept); or set "
            "selection.reference.allow_missing_scores to train without selecting those tokens."
        )

    def column_path(self, column: str) -> Path:
        """The file that holds one column."""
        return column_path(self.folder, column)

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
                f"Column {name!r} has a value of {np.nanmax(np.abs(values))}, too large for "
                f"{self.manifest.dtype}; make the store with --dtype fp32."
            )
        # NaN has many bit patterns; one of them is stored, so that equal scores are equal bytes.
        stored[np.isnan(stored)] = np.nan
        return stored

    def _redo(self, shard: int) -> str:
        return (
            f"Copy the store again, or delete {ShardMarker.path(self.folder, shard)} and score "
            f"again: {self._made_by()}; only that shard is redone."
        )

    def _made_by(self) -> str:
        """How to complete the store.

        The command in its manifest is not printed: the maker of the store wrote it, who may be a
        stranger, and readers run the commands that a program prints.
        """
        return (
            f"run the command that made them again, with --output {self.folder} (resume_command in "
            "its manifest.json keeps it; read it before you run it)"
        )


def _missing_shards(folder: Path, manifest: ScoreManifest) -> frozenset[int]:
    return frozenset(range(manifest.shard_count)) - finished_shards(folder)
