"""The metadata of a score store: manifest.json and one marker per finished shard. No torch.

A store holds one value per token of a corpus, so its manifest binds it by fingerprint to that
corpus, to the tokenizer the corpus was made with and to the reference that scored the tokens.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
DTYPES: dict[str, np.dtype] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
POLICIES = ("packed", "isolated")
RESERVED_COLUMNS = frozenset(
    {"reference_loss", "reference_entropy", "token_id", "position", "corpus_id"}
)
MAXIMUM_SHARDS = 4096
SHARDS_AT_MOST = 1_000_000
"""Every shard is a marker file, and is listed when a store is opened."""


def default_shard_tokens(tokens: int) -> int:
    """Tokens per shard: at least 2**18; at most 4096 shards, whose markers are cheap to list."""
    return max(1 << 18, -(-tokens // MAXIMUM_SHARDS))


def presented_name(column: str) -> str:
    """The name a scorer sees: `loss` in a store is the reference's loss, so `reference_loss`."""
    return {"loss": "reference_loss", "entropy": "reference_entropy"}.get(column, column)


@dataclass(frozen=True)
class ScoreManifest:
    """manifest.json of a score store. Sizes in tokens of the corpus; one value per token and
    column.
    """

    corpus_fingerprint: str
    corpus_tokens: int
    corpus_documents: int
    tokenizer_fingerprint: str
    reference_fingerprint: str
    reference_description: str
    window_tokens: int
    stride_tokens: int
    document_policy: str
    shard_tokens: int
    dtype: str = "fp16"
    columns: tuple[str, ...] = ("loss",)
    resume_command: str = field(default="", compare=False)
    """For a person to read: no program runs it, or prints it as what to run."""
    complete: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if problems := [*self._size_problems(), *self._column_problems()]:
            raise ValueError("Bad score manifest: " + "; ".join(problems) + ".")

    def _size_problems(self) -> list[str]:
        problems = []
        if self.corpus_tokens < 1:
            problems.append(f"the corpus has {self.corpus_tokens} tokens; at least one is needed")
        if self.shard_tokens < 1:
            problems.append(f"shard_tokens is {self.shard_tokens}; it must be at least 1")
        elif self.shard_count > SHARDS_AT_MOST:
            problems.append(
                f"shard_tokens is {self.shard_tokens} of {self.corpus_tokens}; that makes "
                f"{self.shard_count:,} shards, more than {SHARDS_AT_MOST:,}"
            )
        if self.dtype not in DTYPES:
            problems.append(
                f"dtype is {self.dtype!r}; a store keeps {' or '.join(DTYPES)} "
                "(anything coarser moves up to 10 % of the selection)"
            )
        if self.document_policy not in POLICIES:
            problems.append(
                f"document_policy is {self.document_policy!r}; it must be {' or '.join(POLICIES)}"
            )
        if not 1 <= self.stride_tokens <= self.window_tokens:
            problems.append(
                f"stride_tokens is {self.stride_tokens}; it must be between 1 and window_tokens "
                f"({self.window_tokens})"
            )
        return problems

    def _column_problems(self) -> list[str]:
        problems = []
        if not self.columns or len(set(self.columns)) != len(self.columns):
            problems.append(f"columns are {list(self.columns)}; give one or more different names")
        for name in self.columns:
            if name in RESERVED_COLUMNS or not name.isidentifier():
                problems.append(
                    f"{name!r} cannot name a column: use letters, digits and _, and none of "
                    f"{sorted(RESERVED_COLUMNS)}"
                )
        return problems

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def shard_count(self) -> int:
        return -(-self.corpus_tokens // self.shard_tokens)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Absolute token offsets [start, end) of a shard, whatever the number of processes."""
        if not 0 <= shard < self.shard_count:
            raise ValueError(
                f"Shard {shard} does not exist: this store has shards 0 to {self.shard_count - 1}."
            )
        start = shard * self.shard_tokens
        return start, min(start + self.shard_tokens, self.corpus_tokens)

    def differences(self, other: "ScoreManifest") -> list[str]:
        """One phrase per setting in which two stores differ; progress and commands do not count."""
        return [
            f"{f.name} is {getattr(self, f.name)} there and {getattr(other, f.name)} here"
            for f in fields(self)
            if f.compare and getattr(self, f.name) != getattr(other, f.name)
        ]

    @property
    def fingerprint(self) -> str:
        """The identity of the scores: of what, by what and how they were made.

        It is the same before and after the last shard.
        """
        identity = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return "sha256:" + hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        flat = asdict(self)
        corpus = {key: flat.pop(f"corpus_{key}") for key in ("fingerprint", "tokens", "documents")}
        tokenizer = {"fingerprint": flat.pop("tokenizer_fingerprint")}
        reference = {key: flat.pop(f"reference_{key}") for key in ("fingerprint", "description")}
        return {
            "format_version": FORMAT_VERSION,
            "corpus": corpus,
            "tokenizer": tokenizer,
            "reference": reference,
            **flat,
            "columns": list(self.columns),
        }

    @classmethod
    def from_json(cls, path: Path) -> "ScoreManifest":
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if (version := stored.pop("format_version")) != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {version}; this version of megatron-slm reads "
                    f"{FORMAT_VERSION}. Score the corpus again, or use the version that wrote it."
                )
            fields_of: dict[str, Any] = {"columns": tuple(stored.pop("columns"))}
            for section in ("corpus", "tokenizer", "reference"):
                for key, value in stored.pop(section).items():
                    fields_of[f"{section}_{key}"] = value
            return cls(**stored, **fields_of)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{Path(path).parent} is no score store: it has no manifest.json. "
                "Make one with: torchrun -m megatron_slm.score --checkpoint RUN --corpus C "
                "--output S"
            ) from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not the manifest of a score store ({error!r}). Score the corpus again."
            ) from None


@dataclass(frozen=True)
class ShardMarker:
    """shards/shard_000007.json: this range of tokens is on disk, with these bytes."""

    shard: int
    start: int
    end: int
    sha256: dict[str, str]
    without_score: dict[str, int]
    """Tokens whose value is NaN, per column: the first token of each document, and those for which
    the reference gave no finite value.
    """

    @staticmethod
    def path(folder: Path, shard: int) -> Path:
        return folder / "shards" / f"shard_{shard:06d}.json"

    @classmethod
    def describe(
        cls, shard: int, start: int, end: int, values: dict[str, np.ndarray]
    ) -> "ShardMarker":
        sha256 = {name: sha256_of(array) for name, array in values.items()}
        without_score = {name: int(np.isnan(array).sum()) for name, array in values.items()}
        return cls(shard, start, end, sha256, without_score)

    @classmethod
    def read(cls, folder: Path, shard: int) -> "ShardMarker":
        path = cls.path(folder, shard)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a shard marker ({error!r}). Delete it and score again: only that "
                "shard is redone."
            ) from None


def sha256_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()


def finished_shards(folder: Path) -> set[int]:
    """Numbers of the shards that have a marker; one directory listing, no file is opened."""
    try:
        names = os.listdir(folder / "shards")
    except OSError as error:
        raise ValueError(
            f"{folder / 'shards'}: the markers of the finished shards cannot be read "
            f"({error.strerror}). Copy the store again, or score again into another folder."
        ) from None
    return {
        int(name[6:12]) for name in names if name.startswith("shard_") and name.endswith(".json")
    }
