import torch

from megatron_slm.selection import excess_loss, select_top
from megatron_slm.selection.alarms import smallest_population, warnings_of
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


def test_method_04_19_reference_equal_to_the_model_is_noticed_through_fp16_storage():
    loss, _ = healthy()
    assert "reference_is_the_model" in warnings_of(summary_of(loss, loss.half().float()), 0.6)
    exactly = warnings_of(summary_of(loss, loss), 0.6)
    assert {"reference_is_the_model", "scores_tied"} <= set(
        exactly
    ) and "100% of the competing" in exactly["scores_tied"]


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
    assert smallest_population(0.6) == 20 and smallest_population(1.0) == 1


def test_a_reference_that_the_model_has_overtaken_is_noticed():
    loss, _ = healthy()
    generator = torch.Generator().manual_seed(1)
    reference = loss + 1.0 + torch.randn(loss.shape, generator=generator) * 0.3
    assert (
        "has overtaken the reference"
        in warnings_of(summary_of(loss, reference), 0.6)["reference_overtaken"]
    )
