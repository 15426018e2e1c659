import math

import pytest
import torch

from megatron_slm.selection import excess_loss, select_top
from megatron_slm.selection.diagnostics import ChoiceOverlap, describe, summarise
from megatron_slm.selection.metric_sums import add, pack, unpack
from megatron_slm.selection.rates import rate_by_quantile

B, S = 6, 64


def a_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(B, S, generator=generator) * 6
    reference = (loss + torch.randn(B, S, generator=generator)).clamp(min=0.0)
    reference[0, :4] = math.nan
    loss[1, 0] = math.inf
    eligible = torch.rand(B, S, generator=generator) > 0.1
    eligible[0, :4] = eligible[1, 0] = True
    columns = {
        "loss": loss,
        "reference_loss": reference,
        "position": torch.arange(S).expand(B, S),
        "corpus_id": torch.arange(B) % 3,
    }
    return columns, excess_loss(loss, reference), eligible


def described(seed=0, keep_fraction=0.6):
    columns, score, eligible = a_batch(seed)
    selection = select_top(score, eligible, keep_fraction)
    return (
        describe(columns, score, eligible, selection, sequence_length=S, corpora=3),
        columns,
        score,
        eligible,
        selection,
    )


def test_describe_is_plain_arithmetic_over_the_choice():
    measured, columns, score, eligible, selection = described()
    summary = summarise(measured)
    loss, reference, mask = columns["loss"], columns["reference_loss"], selection.mask
    competing = eligible & score.isfinite()
    for name, tokens in {
        "all": eligible & loss.isfinite(),
        "selected": mask,
        "rejected": eligible & loss.isfinite() & ~mask,
    }.items():
        assert summary[f"loss/{name}"] == pytest.approx(float(loss[tokens].double().mean()))
    for name, tokens in {
        "reference": competing,
        "reference_selected": mask,
        "reference_rejected": competing & ~mask,
    }.items():
        assert summary[f"loss/{name}"] == pytest.approx(float(reference[tokens].double().mean()))
    assert summary["selection/kept_fraction"] == selection.kept / selection.eligible
    assert summary["selection/threshold_nats"] == selection.threshold
    assert summary["selection/positive_excess_fraction"] == pytest.approx(
        float((score[competing] > 0).double().mean())
    )
    assert summary["selection/absolute_excess_nats"] == pytest.approx(
        float(score[competing].abs().double().mean())
    )
    assert (
        summary["selection/without_score"],
        summary["selection/non_finite_scores"],
        summary["selection/ties"],
    ) == (4, 1, 1)
    assert summary["selection/without_score_fraction"] == pytest.approx(4 / int(eligible.sum()))
    for b in range(3):
        rows = torch.arange(B) % 3 == b
        assert summary["selection/rate_by_corpus"][b] == pytest.approx(
            float(mask[rows].sum() / eligible[rows].sum())
        )
    bucket = slice(5 * S // 16, 6 * S // 16)
    assert summary["selection/rate_by_position"][5] == pytest.approx(
        float(mask[:, bucket].sum() / eligible[:, bucket].sum())
    )


def test_point_04_ratios_are_formed_after_the_sums_are_added():
    first, *_ = described(0, keep_fraction=0.2)
    second, *_ = described(1, keep_fraction=0.9)
    total = add(add(None, first), second)
    reduced = unpack(
        pack(first) + pack(second), first
    )  # what an all-reduce of the packed sums gives
    assert all(torch.equal(total[name][i], reduced[name][i]) for name in total for i in (0, 1))
    kept = (
        first["loss/selected"][0] + second["loss/selected"][0],
        first["loss/selected"][1] + second["loss/selected"][1],
    )
    assert summarise(total)["loss/selected"] == pytest.approx(float(kept[0] / kept[1]))
    mean_of_means = (summarise(first)["loss/selected"] + summarise(second)["loss/selected"]) / 2
    assert abs(mean_of_means - summarise(total)["loss/selected"]) > 1e-2


def test_rates_by_reference_loss_are_those_of_a_sort():
    generator = torch.Generator().manual_seed(3)
    reference = torch.rand(64, 512, generator=generator) ** 3 * 9
    loss = reference + torch.randn(reference.shape, generator=generator) - 0.3 * reference
    score, eligible = excess_loss(loss, reference), torch.ones_like(reference, dtype=torch.bool)
    selection = select_top(score, eligible, 0.6)
    summary = summarise(
        describe({"loss": loss, "reference_loss": reference}, score, eligible, selection)
    )
    order = reference.view(-1).argsort()
    exact = torch.stack([selection.mask.view(-1)[part].double().mean() for part in order.chunk(20)])
    assert torch.allclose(
        torch.tensor(summary["selection/rate_by_reference_loss"]).double(), exact, atol=0.05
    )
    edges = torch.tensor(summary["selection/rate_by_reference_loss_edges_nats"])
    assert len(edges) == 21
    assert bool((edges.diff() > 0).all())
    assert torch.allclose(
        edges[1:-1], reference.view(-1).quantile(torch.arange(1, 20) / 20), atol=2e-3, rtol=0.02
    )
    assert summary["selection/kept_fraction"] == pytest.approx(
        sum(summary["selection/rate_by_reference_loss"]) / 20, abs=1e-6
    )


def test_quantiles_of_nothing_and_of_one_value():
    nothing = torch.zeros(512, dtype=torch.float64)
    assert rate_by_quantile(nothing, nothing) == ([], [])
    one = nothing.clone()
    one[100] = 40
    rates, edges = rate_by_quantile(one / 4, one)
    assert rates == pytest.approx([0.25] * 20)
    assert edges == sorted(edges)


def test_without_a_reference_or_a_score_the_rest_is_described():
    columns, _, eligible = a_batch()
    loss = columns["loss"].nan_to_num(posinf=9.0)
    summary = summarise(describe({"loss": loss}, None, eligible, select_top(loss, eligible, 1.0)))
    assert summary["selection/kept_fraction"] == 1.0
    assert "loss/reference" not in summary
    assert "selection/without_score" not in summary


def test_an_empty_population_gives_no_ratio_and_no_nan():
    columns, score, eligible = a_batch()
    nothing = torch.zeros_like(eligible)
    summary = summarise(
        describe(
            columns, score, nothing, select_top(score, nothing, 0.6), sequence_length=S, corpora=3
        )
    )
    assert "loss/selected" not in summary
    assert "selection/threshold_nats" not in summary
    assert all(math.isfinite(value) for value in summary.values() if isinstance(value, float))


def test_overlap_of_the_choice_on_a_fixed_probe_set():
    overlap = ChoiceOverlap()
    assert overlap.compare(torch.tensor([True, True, False, False])) == {}
    measured = overlap.compare(torch.tensor([True, False, True, False]))
    assert summarise(measured) == {"selection/probe_overlap_fraction": pytest.approx(1 / 3)}
    resumed = ChoiceOverlap()
    resumed.load_state_dict(overlap.state_dict())
    assert (
        summarise(resumed.compare(torch.tensor([True, False, True, False])))[
            "selection/probe_overlap_fraction"
        ]
        == 1.0
    )
    with pytest.raises(ValueError, match="must stay the same"):
        resumed.compare(torch.ones(3))
