"""Which corpus sample i of a blend is of, and how many samples of that corpus came before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

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

    The rule is a loop over samples, which megatron-core has compiled: a blend of several corpora
    needs it installed, a single corpus does not.
    """
    from megatron.core.datasets import helpers

    dataset_index = np.zeros(size, np.int16)
    dataset_sample_index = np.zeros(size, np.int64)
    helpers.build_blending_indices(
        dataset_index, dataset_sample_index, normalized(weights), len(weights), size, False
    )
    return BlendIndex(dataset_index, dataset_sample_index)


def cached_blend(weights: Sequence[float], size: int, index_cache: str | Path | None) -> BlendIndex:
    """The blend of normalized weights, kept in `index_cache`.

    Weights are not normalized again for the cache's key: that can move their last bit, and so the
    order.
    """
    key = sha256(repr((weights, size)).encode()).hexdigest()[:16]
    folder = Path(index_cache) / f"blend_{key}" if index_cache else None
    return build_once(folder, BlendIndex, partial(blend, weights, size))


def normalized(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum, with the bits of megatron-core's `normalize`."""
    weights_C = np.array(weights, np.float64)
    return (weights_C / np.sum(weights_C)).tolist()


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
        index = cached_blend(normalized(weights), samples, index_cache)
        for start in range(0, samples, COUNTED_AT_ONCE):
            part_N = index.dataset_index[start : start + COUNTED_AT_ONCE]
            counts += np.bincount(part_N, minlength=len(counts))
    return counts.tolist()
