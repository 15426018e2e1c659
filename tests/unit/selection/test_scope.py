import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.selection import SCOPES, Population, RunningThreshold
from megatron_slm.testing.selection_oracle import awkward_scores, expected_mask


@st.composite
def batches(draw):
    rows, tokens = draw(st.integers(0, 6)), draw(st.integers(0, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = awkward_scores(generator, rows * tokens).view(rows, tokens)
    eligible = torch.rand(rows, tokens, generator=generator) < draw(
        st.sampled_from([0.0, 0.3, 0.9, 1.0])
    )
    token_id = torch.randperm(rows * tokens, generator=generator).view(rows, tokens) * 3 - 7
    return score, eligible, token_id if draw(st.booleans()) else None


FRACTIONS = st.one_of(st.sampled_from([1.0, 0.7, 0.6, 0.5, 1e-6]), st.floats(1e-6, 1.0))


@settings(max_examples=150, deadline=None)
@given(batches(), FRACTIONS)
def test_scope_sequence_is_the_brute_force_choice_of_every_row(batch, keep_fraction):
    score, eligible, token_id = batch
    chosen = Population("sequence", token_id).top(score, eligible, keep_fraction)
    kept = competing = 0
    thresholds = []
    for b in range(len(score)):
        mask, threshold, row_kept, row_eligible = expected_mask(
            score[b], eligible[b], keep_fraction, None if token_id is None else token_id[b]
        )
        assert torch.equal(chosen.mask[b], mask)
        kept, competing = kept + row_kept, competing + row_eligible
        thresholds += [threshold] if row_kept else []
    assert (chosen.kept, chosen.eligible) == (kept, competing)
    assert chosen.tokens_here == kept
    assert (
        math.isclose(
            chosen.threshold, sum(thresholds) / len(thresholds), rel_tol=1e-6, abs_tol=1e-6
        )
        if thresholds
        else chosen.threshold == math.inf
    )


@settings(max_examples=60, deadline=None)
@given(batches(), FRACTIONS, st.sampled_from(["micro_batch", "data_parallel", "global_batch"]))
def test_on_one_rank_the_wide_scopes_are_the_brute_force_choice_of_everything(
    batch, keep_fraction, scope
):
    score, eligible, token_id = batch
    token_id = torch.arange(score.numel()).view(score.shape) if token_id is None else token_id
    chosen = Population(scope, token_id).top(score, eligible, keep_fraction)
    assert torch.equal(chosen.mask, expected_mask(score, eligible, keep_fraction, token_id)[0])


def test_sequence_scope_breaks_ties_by_id_and_refuses_repeated_ids():
    score, eligible = torch.zeros(2, 4), torch.ones(2, 4)
    ids = torch.tensor([[3, 1, 2, 0], [4, 5, 6, 7]])
    assert Population("sequence", ids).top(score, eligible, 0.5).mask.tolist() == [
        [False, True, False, True],
        [True, True, False, False],
    ]
    with pytest.raises(ValueError, match="token id 5 occurs twice in one sequence"):
        repeated = torch.tensor([[3, 1, 2, 0], [4, 5, 5, 7]])
        Population("sequence", repeated).top(score, eligible, 0.5)


def test_population_rejects_what_it_cannot_honour():
    with pytest.raises(ValueError, match="scope must be one of sequence, micro_batch"):
        Population("batch")
    with pytest.raises(ValueError, match="global_batch needs token_id"):
        Population("global_batch")
    with pytest.raises(ValueError, match="running_threshold needs its state"):
        Population("running_threshold")
    with pytest.raises(ValueError, match=r"shape \(sequences, tokens\)"):
        Population("sequence").top(torch.zeros(4), torch.ones(4), 0.5)
    assert len(SCOPES) == 5


def test_moments_are_those_of_the_population_the_scope_names():
    value, known = (
        torch.tensor([[1.0, 3.0, math.nan], [5.0, 9.0, 7.0]]),
        torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
    )
    mean, deviation = Population("micro_batch").moments(value, known)
    assert float(mean) == 5.0
    assert float(deviation) == pytest.approx(value[known].std(correction=0).item())
    mean, deviation = Population("sequence").moments(value, known)
    assert mean.tolist() == [[2.0], [7.0]]
    assert deviation[0].item() == 1.0


def test_running_threshold_averages_the_exact_thresholds():
    running = RunningThreshold(smoothing=0.5)
    score, everyone = torch.arange(10.0).view(1, 10), torch.ones(1, 10)
    first = running.choose(score, everyone, 0.5)
    assert first.kept == 5  # no past: exact on this micro-batch
    assert running.threshold is None
    running.finish_step(0.5)
    assert running.threshold == 5.0
    second = running.choose(score + 2, everyone, 0.5)
    assert second.mask.sum() == 7 == second.kept
    assert second.tokens_here == 7
    assert second.threshold == 5.0
    measured = running.finish_step(0.5)
    assert running.threshold == 0.5 * 5.0 + 0.5 * 7.0
    assert [int(x) for x in measured["selection/extra_fraction"]] == [2, 5]
    assert [int(x) for x in measured["selection/missed_fraction"]] == [0, 5]
    assert running.finish_step(0.5) == {}  # a step of plain CLM leaves the threshold alone
    assert running.threshold == 6.0


def test_running_threshold_survives_a_step_without_eligible_tokens_and_a_resume():
    running = RunningThreshold(smoothing=0.0)
    running.choose(torch.arange(4.0), torch.ones(4), 0.5)
    running.finish_step(0.5)
    running.choose(torch.full((4,), math.nan), torch.ones(4), 0.5)
    running.finish_step(0.5)
    assert running.threshold == 2.0
    resumed = RunningThreshold(smoothing=0.0)
    resumed.load_state_dict(running.state_dict())
    assert resumed.choose(torch.tensor([1.0, math.inf, 2.0]), torch.ones(3), 0.5).mask.tolist() == [
        False,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="smoothing must be at least 0"):
        RunningThreshold(1.0)
