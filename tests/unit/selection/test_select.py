import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.selection import excess_loss, kept_tokens, select_top
from megatron_slm.selection.radix import kth_largest_score, kth_smallest_id
from megatron_slm.selection.select import rankable
from megatron_slm.selection.threshold import find_threshold, kth_largest_by_sort
from megatron_slm.testing.selection_oracle import expected_mask

ANY_FLOAT = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, math.nan, math.inf, -math.inf]),
)
FRACTIONS = st.one_of(st.sampled_from([1.0, 0.7, 0.6, 0.5, 0.1, 1e-6, 1 / 3]), st.floats(1e-6, 1.0))


@st.composite
def populations(draw):
    scores = draw(st.lists(ANY_FLOAT, max_size=60))
    eligible = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    ids = draw(
        st.lists(
            st.integers(-(2**40), 2**40), min_size=len(scores), max_size=len(scores), unique=True
        )
    )
    return (
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(eligible, dtype=torch.bool),
        torch.tensor(ids, dtype=torch.int64),
    )


@settings(max_examples=300, deadline=None)
@given(populations(), FRACTIONS, st.booleans())
def test_point_05_exact_k_is_the_brute_force_choice(population, keep_fraction, give_ids):
    score, eligible, token_id = population
    token_id = token_id if give_ids else None
    chosen = select_top(score, eligible, keep_fraction, token_id=token_id)
    mask, threshold, kept, count = expected_mask(score, eligible, keep_fraction, token_id)
    assert torch.equal(chosen.mask, mask)
    assert (chosen.threshold, chosen.kept, chosen.eligible) == (threshold, kept, count)
    assert type(chosen.threshold) is float
    assert type(chosen.kept) is int
    assert type(chosen.eligible) is int
    assert chosen.ties == int((rankable(score, eligible) == threshold).sum())
    assert chosen.tokens_here == int(mask.sum())


@settings(max_examples=200, deadline=None)
@given(populations(), FRACTIONS)
def test_radix_select_gives_the_threshold_of_quickselect(population, keep_fraction):
    score, eligible, _ = population
    ranked = rankable(score, eligible)
    here = find_threshold(ranked, keep_fraction, None)
    facts = dataclasses.astuple(here)
    assert here.here == int((ranked >= here.score).sum())
    assert kth_largest_score(ranked, keep_fraction, None, compact=True) == facts
    assert (
        kth_largest_score(ranked, keep_fraction, None, compact=False) == facts
    )  # the ways of accelerators
    assert kth_largest_by_sort(ranked, keep_fraction) == here


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=40), st.data(), st.booleans())
def test_radix_select_over_ids_is_a_sort(ids, data, compact):
    k = data.draw(st.integers(1, len(ids)))
    expected = sorted(ids)[k - 1]
    assert kth_smallest_id(torch.tensor(ids), k, None, compact=compact) == (
        expected,
        ids.count(expected),
    )


def test_point_05_exact_k_rounds_as_stated():
    score = torch.arange(10.0)
    assert select_top(score, torch.ones(10), 0.7).kept == 7
    assert select_top(score, torch.ones(10), 0.71).kept == 8
    assert select_top(score, torch.ones(10), 1e-10).kept == 1
    hundred = torch.arange(100.0)
    assert 0.55 * 100 > 55  # in floating point, so a plain ceil would keep 56
    assert (
        select_top(hundred, torch.ones(100), 0.55).kept
        == 55
        == kth_largest_score(hundred, 0.55, None)[1]
    )
    assert kept_tokens(0.1, 30) == 3
    assert kept_tokens(0.6, 0) == 0


def test_point_05_ties_are_broken_by_token_id_not_by_place():
    score = torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0])
    chosen = select_top(score, torch.ones(5), 0.6, token_id=torch.tensor([0, 9, 2, 7, 3]))
    assert chosen.mask.tolist() == [True, False, True, False, True]
    assert (chosen.kept, chosen.ties) == (3, 4)


def test_point_06_ineligible_tokens_are_outside_the_mask_and_the_count():
    excess = torch.tensor(
        [-1.0, -2.0, -3.0, -4.0, 0.0, 0.0]
    )  # the last two are padding: excess 0 is above every real token
    eligible = torch.tensor([1, 1, 1, 1, 0, 0])
    chosen = select_top(excess, eligible, 0.5)
    assert chosen.mask.tolist() == [True, True, False, False, False, False]
    assert (chosen.kept, chosen.eligible, chosen.threshold) == (2, 4, -2.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_point_06_non_finite_scores_do_not_compete(broken):
    chosen = select_top(torch.tensor([broken, 1.0, 2.0]), torch.ones(3), 1.0)
    assert chosen.mask.tolist() == [False, True, True]
    assert chosen.eligible == 2


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
def test_point_03_nothing_to_select_is_legal(shape):
    chosen = select_top(torch.zeros(shape), torch.ones(shape), 0.6)
    assert chosen.mask.shape == shape
    assert chosen.kept == chosen.eligible == 0
    assert chosen.threshold == math.inf
    nothing = select_top(torch.zeros(4), torch.zeros(4), 0.6)
    assert not nothing.mask.any()
    assert int(nothing.mask.sum()) == 0
    assert float(nothing.weight_sum) == 0.0


def test_keep_fraction_one_selects_every_eligible_token():
    eligible = torch.rand(4, 33) > 0.3
    assert torch.equal(select_top(torch.randn(4, 33), eligible, 1.0).mask, eligible)


def test_negative_and_positive_zero_tie():
    chosen = select_top(
        torch.tensor([0.0, -0.0]), torch.ones(2), 0.5, token_id=torch.tensor([8, 4])
    )
    assert chosen.mask.tolist() == [False, True]
    assert chosen.ties == 2


def test_more_tokens_than_torch_quantile_can_take():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(2**24 + 5, generator=generator)
    assert (
        int(select_top(score, torch.ones_like(score, dtype=torch.bool), 0.5).mask.sum())
        == 2**23 + 3
    )


def test_half_precision_scores_are_ranked_as_stored():
    score = torch.tensor([1.0, 1.0009765625, 1.0], dtype=torch.float16)
    assert select_top(score, torch.ones(3), 0.3).mask.tolist() == [False, True, False]


@pytest.mark.parametrize("keep_fraction", [0.0, -0.1, 1.0001, math.nan])
def test_keep_fraction_out_of_range_says_so(keep_fraction):
    with pytest.raises(ValueError, match="keep_fraction must be above 0 and at most 1"):
        select_top(torch.zeros(2), torch.ones(2), keep_fraction)


def test_wrong_shapes_and_types_say_so():
    with pytest.raises(
        ValueError, match=r"eligible must have the shape of score \(2,\), got \(3,\)"
    ):
        select_top(torch.zeros(2), torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="token_id must be int64"):
        select_top(torch.zeros(2), torch.ones(2), 0.5, token_id=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="floating point"):
        select_top(torch.zeros(2, dtype=torch.int64), torch.ones(2), 0.5)
    with pytest.raises(ValueError, match="backend must be one of"):
        select_top(torch.zeros(2), torch.ones(2), 0.5, backend="fast")
    with pytest.raises(
        ValueError,
        match="capacity must be the most tokens that any rank holds, got 1, but this rank holds 2",
    ):
        select_top(torch.zeros(2), torch.ones(2), 0.5, capacity=1)


def test_repeated_token_ids_at_the_threshold_are_an_error():
    with pytest.raises(ValueError, match="token id 4 belongs to 2 tokens"):
        select_top(torch.zeros(3), torch.ones(3), 0.4, token_id=torch.tensor([4, 4, 5]))


def test_excess_loss_is_detached_fp32():
    loss = torch.tensor([2.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    excess = excess_loss(loss, torch.tensor([0.5, math.nan]))
    assert excess.dtype == torch.float32
    assert not excess.requires_grad
    assert excess[0] == 1.5
    assert excess[1].isnan()


def test_split_gives_each_micro_batch_its_piece():
    chosen = select_top(torch.arange(12.0).view(4, 3), torch.ones(4, 3), 0.5)
    pieces = chosen.split([1, 3])
    assert [tuple(piece.mask.shape) for piece in pieces] == [(1, 3), (3, 3)]
    assert torch.equal(torch.cat([piece.mask for piece in pieces]), chosen.mask)
    assert pieces[0].kept == chosen.kept
    assert [piece.tokens_here for piece in pieces] == [0, 6]
    assert pieces[1].split([2, 1])[0].tokens_here == 3


def test_a_mask_put_in_the_place_of_the_counted_one_is_not_counted():
    chosen = select_top(torch.arange(12.0), torch.ones(12), 0.5)
    assert dataclasses.replace(chosen, threshold=0.0).tokens_here == 6
    assert dataclasses.replace(chosen, mask=~chosen.mask).tokens_here is None
