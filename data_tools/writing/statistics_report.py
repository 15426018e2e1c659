"""Statistics per source: documents, tokens, bytes per token, quantiles of document length."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.writing.run_state import RunState, SourceCounts
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.files.atomic import write_json_atomically

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def statistics_of(
    lengths_tokens: np.ndarray | FileArray, names: Sequence[str], state: RunState
) -> dict[str, Any]:
    """Numbers of each source and of the whole.

    Documents lie in the order of their sources, so the lengths need no labels.
    """
    sources = []
    start = 0
    for name, counts in zip(names, state.sources, strict=True):
        end = start + counts.documents
        sources.append({"source": name, **_row(lengths_tokens[start:end], counts)})
        start = end
    total = SourceCounts(
        records=state.total("records"),
        documents=state.total("documents"),
        tokens=state.total("tokens"),
        text_bytes=state.total("text_bytes"),
        rejected=dict(state.rejected()),
        filtered=dict(state.filtered()),
    )
    return {"sources": sources, "total": _row(lengths_tokens[:], total)}


def read_statistics(prefix: str, manifest: CorpusManifest) -> dict[str, Any] | None:
    """PREFIX.statistics.json; None when there is none, or when it is of another corpus."""
    path = Path(f"{prefix}.statistics.json")
    if not path.exists():
        return None
    statistics = json.loads(path.read_text(encoding="utf-8"))
    total = statistics["total"]
    if (total["tokens"], total["documents"]) != (manifest.tokens, manifest.documents):
        return None
    return statistics


def merged_statistics(
    parts: Sequence[tuple[np.ndarray | FileArray, dict[str, Any]]], *, shards: bool
) -> dict[str, Any]:
    """Numbers of corpora joined in this order, from each one's document lengths and statistics.

    Rows of shards of one run are added up.
    """
    rows: dict[Any, list[tuple[np.ndarray, dict[str, Any]]]] = {}
    for part, (lengths_tokens, statistics) in enumerate(parts):
        start = 0
        for number, row in enumerate(statistics["sources"]):
            rows.setdefault(number if shards else (part, number), []).append(
                (lengths_tokens[start : start + row["documents"]], row)
            )
            start += row["documents"]
    totals = [(lengths_tokens[:], statistics["total"]) for lengths_tokens, statistics in parts]
    sources = [{"source": pieces[0][1]["source"], **_sum_rows(pieces)} for pieces in rows.values()]
    return {"sources": sources, "total": _sum_rows(totals)}


def _sum_rows(pieces: Sequence[tuple[np.ndarray, dict[str, Any]]]) -> dict[str, Any]:
    """The row of several document lengths and their rows together."""
    counts = SourceCounts()
    for _, row in pieces:
        counts.records += row["records"]
        counts.documents += row["documents"]
        counts.tokens += row["tokens"]
        counts.text_bytes += row["text_bytes"]
        counts.rejected = dict(Counter(counts.rejected) + Counter(row["rejected"]))
        counts.filtered = dict(Counter(counts.filtered) + Counter(row["filtered"]))
    return _row(np.concatenate([lengths_tokens for lengths_tokens, _ in pieces]), counts)


def _row(lengths_tokens: np.ndarray, counts: SourceCounts) -> dict[str, Any]:
    return {
        "records": counts.records,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "text_bytes": counts.text_bytes,
        "bytes_per_token": counts.text_bytes / counts.tokens if counts.tokens else None,
        "document_tokens": length_summary(lengths_tokens),
        "rejected": counts.rejected,
        "filtered": counts.filtered,
    }


def length_summary(lengths_tokens: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles, and a histogram whose bin b counts the lengths in [2**b, 2**(b+1))."""
    if not len(lengths_tokens):
        return {"mean": None, "quantiles": {}, "histogram_log2": []}
    # 4 bytes per document: nothing else in this file grows with the corpus.
    ordered = np.sort(lengths_tokens)
    places = [min(len(ordered) - 1, int(q * len(ordered))) for q in QUANTILES]
    bits = np.bincount(np.log2(np.maximum(ordered, 1)).astype(np.int64))
    return {
        "mean": float(ordered.mean(dtype=np.float64)),
        "quantiles": {
            f"{q:g}": int(ordered[place]) for q, place in zip(QUANTILES, places, strict=True)
        },
        "histogram_log2": bits.tolist(),
    }


def write_statistics(path: Path, statistics: dict[str, Any]) -> None:
    write_json_atomically(path, statistics)
