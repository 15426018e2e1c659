"""Small corpora and score stores for tests and benchmarks, made without text or a model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.indexed import read_index, write_index
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_manifest import ScoreManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.files.hashing import file_sha256

TOKENIZER_FINGERPRINT = "sha256:" + "7" * 64


def write_corpus(
    prefix: str | Path,
    documents: Sequence[np.ndarray],
    *,
    vocabulary_size: int = 1000,
    tokenizer_fingerprint: str = TOKENIZER_FINGERPRINT,
    **tokenizer: Any,
) -> CorpusManifest:
    """PREFIX.bin, .idx and .manifest.json of documents given as token ids.

    tokenizer: fields of the manifest's tokenizer entry, like eod_id.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)
    with open(f"{prefix}.bin", "wb") as stream:
        for document in documents:
            stream.write(np.asarray(document).astype(dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, dtype, np.array([len(document) for document in documents], np.int32))
    index = read_index(f"{prefix}.idx")
    manifest = CorpusManifest(
        format_version=1,
        documents=index.documents,
        tokens=index.tokens,
        token_dtype=dtype.name,
        bin_bytes=index.bin_bytes,
        idx_bytes=Path(f"{prefix}.idx").stat().st_size,
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        tokenizer={
            "path": "none",
            "kind": "none",
            "fingerprint": tokenizer_fingerprint,
            "vocabulary_size": vocabulary_size,
            "eod_id": 0,
            **tokenizer,
        },
        append_eod=True,
        sources=[],
        created_by={},
        rejected={},
    )
    manifest.write(prefix)
    return manifest


def random_documents(
    count: int, mean_tokens: int, *, vocabulary_size: int = 1000, seed: int = 0
) -> list[np.ndarray]:
    """Documents of 1 to 2 x mean_tokens random ids, each ending in token 0."""
    random = np.random.RandomState(seed)
    lengths = random.randint(0, 2 * mean_tokens, count)
    return [np.append(random.randint(1, vocabulary_size, length), 0) for length in lengths]


def score_manifest(corpus: CorpusManifest, **settings: Any) -> ScoreManifest:
    """A score manifest of this corpus with small windows and shards; settings replace fields."""
    plain = ScoreManifest(
        corpus.fingerprint,
        corpus.tokens,
        corpus.documents,
        corpus.tokenizer["fingerprint"],
        "sha256:" + "5" * 64,
        "test reference",
        window_tokens=16,
        stride_tokens=16,
        document_policy="packed",
        shard_tokens=64,
        dtype="fp32",
    )
    return replace(plain, **settings)


def write_scores(
    folder: str | Path,
    prefix: str | Path,
    value: Callable[[np.ndarray], np.ndarray] = lambda offsets: offsets,
    **settings: Any,
) -> ScoreStore:
    """A complete store: value(absolute offset) at each token, NaN at the first of each document."""
    manifest = score_manifest(CorpusManifest.read(prefix), **settings)
    index = read_index(f"{prefix}.idx")
    starts = index.non_empty_starts_tokens()
    store = ScoreStore.create(folder, manifest)
    for shard in range(manifest.shard_count):
        start, end = manifest.shard_range(shard)
        values = value(np.arange(start, end)).astype(np.float64)
        values[np.isin(np.arange(start, end), starts)] = np.nan
        store.write_shard(
            shard, {column: values + number for number, column in enumerate(manifest.columns)}
        )
    store.finish()
    return store
