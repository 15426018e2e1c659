"""One optimizer step of selective language modeling: it reads like the paper.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from megatron_slm.data.batch import Batch
from megatron_slm.model.decoder import HeadOutput
from megatron_slm.model.forward_backward import LossFunction, forward_backward
from megatron_slm.model.optimizer import update_weights
from megatron_slm.model.router import pop_router_metrics
from megatron_slm.selection import TrainingProgress
from megatron_slm.selection.metric_sums import MetricSums, add
from megatron_slm.training.step_choices import (
    StepChoices,
    divisor_ahead,
    select_before_backward,
    with_reference_losses,
)
from megatron_slm.training.token_selector import TokenSelector
from megatron_slm.training.trainer import Trainer


@dataclass
class StepReport:
    """What a step did."""

    updated: bool
    """False after an fp16 overflow, whose norm is nan, or another norm that is not finite."""
    grad_norm: float
    measured: MetricSums = field(default_factory=dict)
    """This rank's sums and counts; empty off the last pipeline stage."""
    selected_tokens: Tensor | None = None
    """How many tokens this rank selected (float64, 0-d); None off the last pipeline stage."""


class MicroBatchReport(NamedTuple):
    """What one micro-batch adds to the report of its step."""

    selected_tokens: Tensor
    measured: MetricSums


def train_step(
    trainer: Trainer, batches: Sequence[Batch], progress: TrainingProgress, learning_rate: float
) -> StepReport:
    """The gradient of the mean loss over the tokens selected in the global batch, and one update.

    Equals, in one process: sum over selected tokens of -log P(x_i | x_<i), divided by their number
    in the whole optimizer step (Rho-1, equations 4 and 5), backward, clip, AdamW.
    """
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()

    batches = with_reference_losses(trainer, batches)
    choices = select_before_backward(trainer, batches, progress)
    head_choices = None
    if choices is not None and trainer.selector.head_on_selected_rows:
        head_choices = choices.for_head
    reports = forward_backward(
        trainer.models,
        batches,
        selected_loss(trainer.selector, choices, progress),
        trainer.groups,
        divisor_ahead=divisor_ahead(trainer, batches, choices, progress),
        head_choices=head_choices,
    )

    updated, grad_norm = update_weights(trainer.optimizer, learning_rate)
    measured = trainer.selector.finish_step(progress)
    measured |= pop_router_metrics(trainer.models, trainer.groups)
    return _step_report(updated, grad_norm, measured, reports)


def selected_loss(
    selector: TokenSelector, choices: StepChoices | None, progress: TrainingProgress
) -> LossFunction[MicroBatchReport]:
    """The loss function of one micro-batch: select, then sum the selected tokens' losses.

    The division comes at the end of the step, when the number of selected tokens is known.
    """

    def loss_function(index: int, batch: Batch, output: HeadOutput):
        outputs = output.per_token()
        if choices is None:
            selection = selector.choose(batch, outputs, progress)
        else:
            selection = choices.selections[index]
        loss_sum = output.loss_sum
        if loss_sum is None:
            loss_BS = output.loss_of(selection.mask, selection.tokens_here)
            loss_sum = loss_BS.mul(selection.weights).sum()
        elif choices is not None and choices.outputs[index]:
            # The head has computed selected rows only: metrics take the losses of the first pass.
            outputs = choices.outputs[index]
        measured = selector.describe(batch, outputs, selection, progress)
        report = MicroBatchReport(selection.choice.sum().double(), measured)
        return loss_sum, selection.weight_sum, report

    return loss_function


def _step_report(
    updated: bool, grad_norm: float, measured: MetricSums, reports: Sequence[MicroBatchReport]
) -> StepReport:
    selected_tokens: Tensor | None = None
    for report in reports:
        measured = add(measured, report.measured)
        so_far = 0.0 if selected_tokens is None else selected_tokens
        selected_tokens = so_far + report.selected_tokens
    return StepReport(updated, grad_norm, measured, selected_tokens)
