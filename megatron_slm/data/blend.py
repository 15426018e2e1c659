"""Which corpus sample i of a blend is of, and how many samples of that corpus came before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import normalize

from megatron_slm.data.epoch_index import build_once
from megatron_slm.data.file_array import FileArray

COUNTED_AT_ONCE = 1 << 24
"""Entries of a blend's index that are copied to count them: 128 MiB as int64."""


@dataclass(frozen=True)
class BlendIndex:
    """One entry per sample of the blend."""

    dataset_index: np.ndarray | FileArray
    """int16 [samples]: the corpus of each sample."""
    dataset_sample_index: np.ndarray | FileArray
    """int64 [samples]: how many samples of that corpus came before."""


def blend(weights: Sequence[float], size: int) -> BlendIndex:
    """The first `size` samples of a blend: megatron-core's greedy rule, which keeps each corpus as
    close to its weight as whole samples allow.
    """
    dataset_index = np.zeros(size, np.int16)
    dataset_sample_index = np.zeros(size, np.int64)
    helpers.build_blending_indices(
        dataset_index, dataset_sample_index, normalize(list(weights)), len(weights), size, False
    )
    return BlendIndex(dataset_index, dataset_sample_index)


def cached_blend(weights: Sequence[float], size: int, index_cache: str | Path | None) -> BlendIndex:
    """The blend of weights that BlendedDataset has normalized, kept in `index_cache`.

    Weights are not normalized again for the cache's key: that can move their last bit, and so the
    order.
    """
    key = sha256(repr((weights, size)).encode()).hexdigest()[:16]
    folder = Path(index_cache) / f"blend_{key}" if index_cache else None
    return build_once(folder, BlendIndex, partial(blend, weights, size))


def samples_by_corpus(
    weights: Sequence[float], samples: int, index_cache: str | Path | None = None
) -> list[int]:
    """How many of the first `samples` of a blend are of each corpus; one weight, or none, is one
    corpus.
    """
    if len(weights) < 2:
        return [samples]
    counts = np.zeros(len(weights), np.int64)
    if samples:
        index = cached_blend(normalize([float(weight) for weight in weights]), samples, index_cache)
        for start in range(0, samples, COUNTED_AT_ONCE):
            part_N = index.dataset_index[start : start + COUNTED_AT_ONCE]
            counts += np.bincount(part_N, minlength=len(counts))
    return counts.tolist()
