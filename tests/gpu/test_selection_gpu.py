"""The exact choice on a GPU is the CPU's, by a sort and by radix select. Skipped without CUDA."""

import math
from dataclasses import astuple

import pytest
import torch

from benchmarks import topk
from megatron_slm.selection import select_top
from megatron_slm.selection.radix import kth_largest_score
from megatron_slm.selection.select import rankable
from megatron_slm.selection.threshold import find_threshold, kth_largest_by_sort

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")


def scores(tokens: int, different: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(score, eligible) with ties, tokens that do not compete, and scores that are not finite."""
    generator = torch.Generator().manual_seed(tokens)
    score_N = torch.randn(tokens, generator=generator)
    if different:
        score_N = (score_N * different).round() / different
    score_N[::97] = math.nan
    score_N[1::101] = math.inf
    return score_N, torch.rand(tokens, generator=generator) < 0.9


@pytest.mark.parametrize("keep_fraction", [0.001, 0.6, 1.0])
@pytest.mark.parametrize("tokens, different", [(1_000_000, 0), (100_000, 3), (3, 0)])
def test_the_choice_is_that_of_a_cpu(tokens, different, keep_fraction):
    score_N, eligible_N = scores(tokens, different)
    expected = select_top(score_N, eligible_N, keep_fraction)
    chosen = select_top(score_N.to(DEVICE), eligible_N.to(DEVICE), keep_fraction)
    assert torch.equal(chosen.mask.cpu(), expected.mask)
    assert chosen.threshold == expected.threshold
    assert chosen.kept == expected.kept
    assert chosen.ties == expected.ties


@pytest.mark.parametrize("tokens, different", [(1_000_000, 0), (100_000, 3), (3, 0)])
def test_radix_select_gives_the_threshold_of_a_sort(tokens, different):
    ranked_N = rankable(*scores(tokens, different))
    expected = find_threshold(ranked_N, 0.6, None)
    assert kth_largest_by_sort(ranked_N.to(DEVICE), 0.6) == expected
    assert kth_largest_score(ranked_N.to(DEVICE), 0.6, None) == astuple(expected)


@pytest.mark.parametrize("name", topk.CASES)
def test_every_way_of_the_benchmark_finds_the_same_threshold(name):
    assert topk.run_case(topk.CASES[name], DEVICE, 100_000, 0.6, rounds=2)["correct"]
