"""The manifest beside every corpus, and the check of a corpus against it.

PREFIX.manifest.json is written last, so its presence means that PREFIX.bin and PREFIX.idx are
whole. megatron-core itself opens a truncated .bin without complaint; `check_corpus` refuses one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_slm.data.indexed import check_bin_size, read_index
from megatron_slm.data.verified import check_content
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.tokenization import tokenizer_differences

FORMAT_VERSION = 1
_TYPES: dict[str, type] = {
    "documents": int,
    "tokens": int,
    "token_dtype": str,
    "bin_bytes": int,
    "idx_bytes": int,
    "bin_sha256": str,
    "idx_sha256": str,
    "tokenizer": dict,
    "append_eod": bool,
    "sources": list,
    "created_by": dict,
    "rejected": dict,
    "prepend_bos": bool,
    "filters": dict,
}
_OPTIONAL = {"prepend_bos", "filters"}
"""Fields that manifests of earlier versions do not have."""
_TOKENIZER_FIELDS = {"path", "kind", "fingerprint", "vocabulary_size", "eod_id"}


@dataclass
class CorpusManifest:
    """The identity of one corpus: what is in PREFIX.bin/.idx, how it was made and from what."""

    format_version: int
    documents: int
    tokens: int
    token_dtype: str
    """uint16 or int32."""
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    tokenizer: dict[str, Any]
    """path, kind, fingerprint, vocabulary_size, eod_id, bos_id (not in earlier versions)."""
    append_eod: bool
    sources: list[dict[str, Any]]
    created_by: dict[str, Any]
    rejected: dict[str, Any]
    prepend_bos: bool = False
    filters: dict[str, Any] = field(default_factory=dict)
    """How many documents each filter left out; by choice, unlike `rejected`."""
    shard: dict[str, Any] | None = None
    """index, count and plan of an array-job shard; None for a whole corpus."""

    @property
    def fingerprint(self) -> str:
        """The identity of the content: equal for equal .bin and .idx, wherever they lie."""
        return (
            "sha256:" + hashlib.sha256(f"{self.bin_sha256}\n{self.idx_sha256}".encode()).hexdigest()
        )

    @classmethod
    def read(cls, prefix: str | Path) -> CorpusManifest:
        path = manifest_path(prefix)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(_no_manifest(prefix)) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot read the manifest ({error})") from None
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            got = (
                content.get("format_version")
                if isinstance(content, dict)
                else type(content).__name__
            )
            raise ValueError(
                f"{path}: manifest format {got}, expected {FORMAT_VERSION}. Make it again with "
                f"this version: python -m data_tools.verify {prefix} --write-manifest "
                "--tokenizer P.model"
            )
        missing = _TYPES.keys() - _OPTIONAL - content.keys()
        unknown = content.keys() - {f.name for f in fields(cls)} - {"fingerprint"}
        if missing or unknown:
            raise ValueError(
                f"{path}: the manifest lacks {sorted(missing)} and has unknown fields "
                f"{sorted(unknown)}"
            )
        manifest = cls.from_json(content)
        manifest._check_types(path)
        return manifest

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CorpusManifest:
        return cls(**{name: value for name, value in content.items() if name != "fingerprint"})

    def _check_types(self, path: Path) -> None:
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{path}: {name} is {value!r}, expected {kind.__name__}")
        if missing := _TOKENIZER_FIELDS - self.tokenizer.keys():
            raise ValueError(f"{path}: tokenizer lacks {sorted(missing)}")

    def write(self, prefix: str | Path) -> None:
        write_json_atomically(manifest_path(prefix), self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, **asdict(self)}


def tokenizer_of(manifests: Sequence[CorpusManifest]) -> dict[str, Any]:
    """The tokenizer entry that corpora of one tokenizer share, with prepend_bos (None when they
    differ in it).
    """
    answers = {manifest.prepend_bos for manifest in manifests}
    return {**manifests[0].tokenizer, "prepend_bos": answers.pop() if len(answers) == 1 else None}


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def check_corpus(
    prefix: str | Path, *, tokenizer: Mapping[str, Any] | None = None
) -> CorpusManifest:
    """The manifest of a corpus whose files are whole and unchanged since it was written.

    Sizes and structure are checked every time. Content is hashed when a file's stamp (size,
    modification and change time, inode) is not the one remembered in PREFIX.verified.json; in a
    folder that cannot be written the stamp is not remembered.

    Raises ValueError with a sentence: files missing, truncated or too long, index and manifest
    disagreeing, content changed, no manifest, or another tokenizer than `tokenizer`, a tokenizer's
    entry.
    """
    manifest = CorpusManifest.read(prefix)
    expected = tokenizer or {}
    if differences := tokenizer_differences(manifest.tokenizer, expected):
        raise ValueError(
            f"{prefix}: the corpus was made with the tokenizer {manifest.tokenizer['path']}, not "
            f"with {expected.get('path', 'this one')}: {'; '.join(differences)}. Use the corpus's "
            "own tokenizer (and the files beside it, which name its special tokens), or preprocess "
            "the text again with this one."
        )
    for suffix, expected_bytes in ((".idx", manifest.idx_bytes), (".bin", manifest.bin_bytes)):
        _check_size(Path(f"{prefix}{suffix}"), expected_bytes)
    index = read_index(f"{prefix}.idx")
    check_bin_size(prefix, index)
    indexed = {
        "documents": index.documents,
        "tokens": index.tokens,
        "token_dtype": index.dtype.name,
    }
    for name, value in indexed.items():
        if getattr(manifest, name) != value:
            raise ValueError(
                f"{prefix}.idx holds {name} = {value}, its manifest says {getattr(manifest, name)}"
            )
    check_content(prefix, {".bin": manifest.bin_sha256, ".idx": manifest.idx_sha256})
    return manifest


def _check_size(path: Path, expected_bytes: int) -> None:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); its manifest says it has "
            f"{expected_bytes} bytes"
        ) from None
    if size_bytes != expected_bytes:
        word = "truncated" if size_bytes < expected_bytes else "too long"
        raise ValueError(
            f"{path}: the file is {word}: {size_bytes} bytes, its manifest says "
            f"{expected_bytes}. Copy it again, or make the corpus again."
        )


def _no_manifest(prefix: str | Path) -> str:
    if not Path(f"{prefix}.bin").exists():
        return (
            f"{prefix}: no such corpus (neither {prefix}.bin nor its manifest). Give the prefix "
            "without suffix, as data_tools.preprocess --output-prefix had it."
        )
    return (
        f"{manifest_path(prefix)}: the corpus has no manifest. If data_tools.preprocess was "
        "interrupted, run it again; for a corpus made by another tool: python -m "
        f"data_tools.verify {prefix} --write-manifest --tokenizer P.model"
    )
