import torch

from megatron_slm.selection import excess_loss, select_top
from megatron_slm.selection.alarms import (
    ranks_tokens,
    reference_overtaken,
    smallest_population,
    warnings_of,
)
from megatron_slm.selection.diagnostics import describe, summarise


def summary_of(loss, reference, keep_fraction=0.6, eligible=None):
    eligible = torch.ones_like(loss, dtype=torch.bool) if eligible is None else eligible
    score = excess_loss(loss, reference)
    selection = select_top(score, eligible, keep_fraction)
    return summarise(
        describe({"loss": loss, "reference_loss": reference}, score, eligible, selection)
    )


def healthy():
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(8, 128, generator=generator) * 5 + 0.5
    return loss, loss - 0.5 + torch.randn(loss.shape, generator=generator) * 0.3


def test_a_healthy_run_warns_of_nothing():
    assert warnings_of(summary_of(*healthy()), keep_fraction=0.6) == {}


def test_point_19_reference_equal_to_the_model_is_noticed_through_fp16_storage():
    loss, _ = healthy()
    assert "reference_is_the_model" in warnings_of(summary_of(loss, loss.half().float()), 0.6)
    exactly = warnings_of(summary_of(loss, loss), 0.6)
    assert {"reference_is_the_model", "scores_tied"} <= set(exactly)
    assert "100% of the competing" in exactly["scores_tied"]


def test_holes_in_the_scores_are_noticed():
    loss, reference = healthy()
    reference[0, :13] = torch.nan
    assert "1.27% of the tokens" in warnings_of(summary_of(loss, reference), 0.6)["coverage_hole"]


def test_infinite_scores_are_noticed():
    loss, reference = healthy()
    reference[0, 0] = torch.inf
    assert (
        "1 tokens have an infinite score"
        in warnings_of(summary_of(loss, reference), 0.6)["scores_not_finite"]
    )


def test_a_keep_fraction_that_cannot_be_met_is_noticed():
    loss, reference = healthy()
    assert (
        "0.601 of the competing"
        in warnings_of(summary_of(loss, reference), keep_fraction=0.3)["keep_fraction_not_met"]
    )
    nothing = summary_of(loss, reference, eligible=torch.zeros_like(loss, dtype=torch.bool))
    assert "No token competed" in warnings_of(nothing, 0.6)["keep_fraction_not_met"]
    assert "keep_fraction_not_met" not in warnings_of(nothing, None)
    assert smallest_population(0.6) == 20
    assert smallest_population(1.0) == 1


def test_a_model_ahead_on_all_tokens_has_overtaken_though_it_is_behind_on_those_it_selects():
    loss, _ = healthy()
    generator = torch.Generator().manual_seed(1)
    # 0.75 nats ahead in the mean, yet behind on a third of the tokens, which are most of the
    # selected ones.
    reference = loss + 0.75 + torch.randn(loss.shape, generator=generator) * 2.0
    summary = summary_of(loss, reference, keep_fraction=0.2)
    assert summary["loss/selected"] > summary["loss/reference_selected"]
    sentence = warnings_of(summary, 0.2)["reference_overtaken"]
    assert sentence == reference_overtaken(summary["loss/all"], summary["loss/reference"])
    assert (
        f"{summary['loss/all']:.3f} against {summary['loss/reference']:.3f} nats on all" in sentence
    )


def test_a_model_behind_on_all_tokens_has_not_overtaken_whatever_was_selected():
    loss, reference = healthy()
    # Chosen where the model is ahead: as the band scorer, a mask, or a threshold that lags may
    # choose.
    selection = select_top(-excess_loss(loss, reference), torch.ones_like(loss).bool(), 0.1)
    columns = {"loss": loss, "reference_loss": reference}
    summary = summarise(describe(columns, None, torch.ones_like(loss).bool(), selection))
    assert summary["loss/selected"] < summary["loss/reference_selected"]
    assert "reference_overtaken" not in warnings_of(summary)


def test_only_a_choice_that_ranks_tokens_is_told_of_its_reference():
    loss, _ = healthy()
    assert "reference_overtaken" in warnings_of(summary_of(loss, loss + 1.0))
    assert "reference_overtaken" not in warnings_of(summary_of(loss, loss + 1.0), ranked=False)
    assert [name for name in ("none", "random", "excess_loss") if ranks_tokens(name)] == [
        "excess_loss"
    ]
    assert not ranks_tokens("excess_loss", 1.0)
    assert ranks_tokens("excess_loss", {"style": "linear", "end": 0.6})


def test_nothing_is_said_of_a_reference_without_the_loss_of_all_tokens():
    loss, _ = healthy()
    selection = select_top(-loss, torch.ones_like(loss).bool(), 0.6)
    columns = {"loss": loss, "reference_loss": loss + 1.0}
    measured = describe(
        columns, None, torch.ones_like(loss).bool(), selection, loss_of_selected_only=True
    )
    assert "reference_overtaken" not in warnings_of(summarise(measured))
