"""The step without a model: what it selects and when, what it sums, what it leaves as it was."""

from types import SimpleNamespace

import pytest
import torch

from megatron_slm.config.schema import ReferenceConfig, SelectionConfig
from megatron_slm.data.batch import Batch
from megatron_slm.model.decoder import HeadOutput, head_output
from megatron_slm.selection import TrainingProgress
from megatron_slm.training import step, step_choices
from megatron_slm.training.step import selected_loss
from megatron_slm.training.step_choices import (
    StepChoices,
    divisor_ahead,
    select_before_backward,
    with_reference_losses,
)
from megatron_slm.training.token_selector import TokenSelector

B, S = 2, 8
START = TrainingProgress(0, 0)
LAST = SimpleNamespace(dp_cp=None, cp=None, is_last_stage=True, device=torch.device("cpu"))
FIRST = SimpleNamespace(**{**vars(LAST), "is_last_stage": False})


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.zeros(B, S, dtype=torch.int64)
    token_id_BS = torch.arange(B * S).view(B, S) + seed * B * S
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        loss_mask_BS=torch.ones(B, S),
        position_ids_BS=token_id_BS % S,
        token_id_BS=token_id_BS,
        corpus_id_B=torch.zeros(B, dtype=torch.int64),
        columns={"reference_loss": torch.rand(B, S, generator=generator)},
    )


def losses_of(seed: int) -> torch.Tensor:
    return torch.rand(B, S, generator=torch.Generator().manual_seed(100 + seed)) * 4


def trainer_of(groups=LAST, *, reference=None, experts: bool = False, **settings):
    selection = SelectionConfig(
        **{"scorer": "excess_loss", "keep_fraction": 0.5, "scope": "micro_batch", **settings},
        reference=ReferenceConfig(scores=["scores"]),
    )
    return SimpleNamespace(
        selector=TokenSelector(selection, groups, sequence_length=S, corpora=1),
        models=["models"],
        groups=groups,
        reference=reference,
        reference_extras=(),
        weight_needed_ahead=experts,
    )


@pytest.fixture
def passes(monkeypatch):
    """Stands in for forward passes; notes which models ran."""
    ran = []

    def forward_losses(models, batches, groups, extras=()):
        ran.append(models)
        if not groups.is_last_stage:
            return []
        return [{"loss": losses_of(number)} for number, _ in enumerate(batches)]

    monkeypatch.setattr(step_choices, "forward_losses", forward_losses)
    return ran


def test_reference_losses_go_into_new_batches(passes):
    batches = [batch_of(0), batch_of(1)]
    before = [batch.columns["reference_loss"].clone() for batch in batches]
    scored = with_reference_losses(trainer_of(reference=["reference"]), batches)
    assert passes == [["reference"]]
    for number, batch in enumerate(scored):
        assert torch.equal(batch.columns["reference_loss"], losses_of(number))
        assert torch.equal(batches[number].columns["reference_loss"], before[number])


def test_without_an_online_reference_the_stored_losses_stay(passes):
    batches = [batch_of(0)]
    assert with_reference_losses(trainer_of(), batches) == batches
    assert not passes


def test_a_micro_batch_that_selects_from_its_own_losses_has_no_choice_before(passes):
    assert select_before_backward(trainer_of(), [batch_of(0)], START) is None
    assert not passes


def test_choices_of_a_whole_step_are_empty_off_the_last_stage_which_runs_the_forward_pass_too(
    passes,
):
    batches = [batch_of(0), batch_of(1)]
    choices = select_before_backward(trainer_of(FIRST, scope="global_batch"), batches, START)
    assert choices == StepChoices()
    assert choices.for_head == []
    assert passes == [["models"]]


def test_a_whole_step_is_one_choice_cut_into_its_micro_batches(passes):
    batches = [batch_of(0), batch_of(1)]
    choices = select_before_backward(trainer_of(scope="global_batch"), batches, START)
    excess = torch.cat(
        [losses_of(i) - batch.columns["reference_loss"] for i, batch in enumerate(batches)]
    )
    expected = excess >= excess.flatten().sort(descending=True).values[B * S - 1]
    assert torch.equal(torch.cat([part.mask for part in choices.selections]), expected)
    assert [part.weight_BS.shape for part in choices.for_head] == [(B, S), (B, S)]
    tokens = [int(part.sum()) for part in expected.split(B)]
    assert [part.tokens for part in choices.for_head] == tokens


def test_the_loss_of_selected_tokens_is_summed_and_counted():
    trainer = trainer_of()
    batch, loss_BS = batch_of(0), losses_of(0)
    loss_function = selected_loss(trainer.selector, None, START)
    loss_sum, divisor, report = loss_function(0, batch, HeadOutput(loss_BS, None, {}))
    excess_BS = loss_BS - batch.columns["reference_loss"]
    chosen_BS = excess_BS >= excess_BS.flatten().sort(descending=True).values[B * S // 2 - 1]
    assert float(loss_sum) == pytest.approx(float(loss_BS[chosen_BS].sum()))
    assert float(divisor) == float(report.selected_tokens) == B * S // 2


def test_a_head_on_selected_rows_has_summed_already_and_metrics_see_every_loss(passes):
    trainer = trainer_of(scope="global_batch")
    assert trainer.selector.head_on_selected_rows
    batch = batch_of(0)
    choices = select_before_backward(trainer, [batch], START)
    seen_BS = torch.where(choices.selections[0].mask, losses_of(0), torch.nan)
    output = HeadOutput(seen_BS, torch.tensor(7.0), {})
    loss_sum, _, report = selected_loss(trainer.selector, choices, START)(0, batch, output)
    assert float(loss_sum) == 7.0
    total, count = report.measured["loss/all"]
    assert float(total) == pytest.approx(float(losses_of(0).sum()))
    assert float(count) == B * S


@pytest.mark.parametrize("scope", ("micro_batch", "global_batch"))
def test_experts_know_the_divisor_before_backward(passes, scope):
    trainer = trainer_of(scope=scope, experts=True)
    batches = [batch_of(0), batch_of(1)]
    choices = select_before_backward(trainer, batches, START)
    assert float(divisor_ahead(trainer, batches, choices, START)) == B * S
    assert float(divisor_ahead(trainer_of(FIRST, experts=True), batches, None, START)) == 0.0
    assert divisor_ahead(trainer_of(scope=scope), batches, choices, START) is None


def test_reports_of_micro_batches_add_up():
    parts = [
        step.MicroBatchReport(torch.tensor(number), {"loss/all": (torch.tensor(1.0),) * 2})
        for number in (3.0, 4.0)
    ]
    report = step._step_report(True, 1.0, {}, parts)
    assert float(report.selected_tokens) == 7.0
    assert [float(value) for value in report.measured["loss/all"]] == [2.0, 2.0]
    assert step._step_report(True, 1.0, {}, []).selected_tokens is None


def test_a_wrapped_heads_output_is_read_by_name_again():
    loss_BS = losses_of(0)
    whole = HeadOutput(loss_BS, torch.tensor(2.0), {"entropy": loss_BS + 1})
    again = head_output(tuple(whole))
    assert again.loss_sum is whole.loss_sum
    assert list(again.per_token()) == ["loss", "entropy"]
    alone = head_output(loss_BS)
    assert alone.loss_sum is None
    assert alone.per_token() == {"loss": loss_BS}
