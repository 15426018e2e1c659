"""The options of a preprocessing run, and which of them decide the bytes of the corpus."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.encoding.worker import EncodeSettings
from data_tools.reading.inputs import SourceFile, plan_fingerprint
from megatron_slm.tokenization import Tokenizer


@dataclass(frozen=True)
class PreprocessingSettings:
    """The options of data_tools.preprocess."""

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    workers: int
    file_format: str
    include: tuple[str, ...]
    encode: EncodeSettings
    max_bad_fraction: float
    shard: tuple[int, int] | None
    overwrite: bool
    skip_complete: bool
    restart: bool
    save_every_seconds: float
    encoder: str

    @property
    def prefix(self) -> str:
        """The prefix of the corpus, or of the shard of it that this run makes."""
        if self.shard is None:
            return self.output_prefix
        return shard_prefix(self.output_prefix, *self.shard)


def shard_prefix(output_prefix: str, index: int, count: int) -> str:
    return f"{output_prefix}.shard-{index:05d}-of-{count:05d}"


def identity_of(
    settings: PreprocessingSettings, tokenizer: Tokenizer, files: list[SourceFile]
) -> dict[str, Any]:
    """Everything that decides the bytes of the corpus.

    A run continues an unfinished one only if their identities are equal.
    """
    encode = asdict(settings.encode)
    filters = encode.pop("filters")
    encode["keys"] = list(encode["keys"])
    if filters["keep_if"]:
        file_name = filters["keep_if"].rpartition(":")[0]
        filters["keep_if_sha256"] = hashlib.sha256(Path(file_name).read_bytes()).hexdigest()
    return {
        "inputs": list(settings.inputs),
        "files": plan_fingerprint(files),
        "format": settings.file_format,
        "tokenizer": tokenizer.fingerprint,
        "eod_id": tokenizer.eod_id,
        "bos_id": tokenizer.bos_id,
        "shard": list(settings.shard) if settings.shard else None,
        **encode,
        **filters,
    }


def finished_identity(settings: PreprocessingSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """What a finished corpus was made from.

    The identity, and the limit of bad records that was kept: an unfinished run may be continued
    with another limit.
    """
    return {**identity, "max_bad_fraction": settings.max_bad_fraction}
