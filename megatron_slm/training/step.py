"""One optimizer step of selective language modeling: it reads like the paper.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron_slm.data.batch import Batch
from megatron_slm.model.forward_backward import (
    LossFunction,
    forward_backward,
    forward_losses,
    set_extra_outputs,
    split_outputs,
)
from megatron_slm.model.optimizer import update_weights
from megatron_slm.model.router import has_auxiliary_losses, pop_router_metrics
from megatron_slm.parallel import Groups
from megatron_slm.selection import Selection, TrainingProgress
from megatron_slm.selection.metric_sums import MetricSums, add
from megatron_slm.training.token_selector import TokenSelector


@dataclass
class Trainer:
    """What a step works on."""

    models: list
    optimizer: object
    selector: TokenSelector
    groups: Groups
    reference: list | None = None
    """Frozen reference models of an online reference, in the same layout."""

    def __post_init__(self):
        set_extra_outputs(self.models, self.selector.extras)
        self.selector.weight_needed_ahead = has_auxiliary_losses(self.models)

    @property
    def reference_extras(self) -> tuple[str, ...]:
        """What the online reference must give beside its loss."""
        return ("entropy",) if "reference_entropy" in self.selector.scorer.needs else ()


class Known(NamedTuple):
    """The choice on one micro-batch that was made before the training pass."""

    selection: Selection
    outputs: dict[str, torch.Tensor]
    """What a forward pass gave of every token, "loss" among it; empty for a static scorer, which needs none."""


@dataclass
class StepReport:
    """What a step did. `measured`: this rank's sums and counts (last pipeline stage only). Not updated: fp16 overflow, norm nan."""

    updated: bool
    grad_norm: float
    measured: MetricSums = field(default_factory=dict)


def train_step(
    trainer: Trainer, batches: Sequence[Batch], progress: TrainingProgress, learning_rate: float
) -> StepReport:
    """The gradient of the mean loss over the tokens selected in the global batch, and one AdamW update.

    Equals, in one process: sum over selected tokens of -log P(x_i | x_<i), divided by their number in the whole
    optimizer step (Rho-1, equations 4 and 5), backward, clip, AdamW.
    """
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()

    score_with_reference(trainer, batches)
    known = choose_before_backward(trainer, batches, progress)
    reports = forward_backward(
        trainer.models,
        batches,
        selected_loss(trainer.selector, known, progress),
        trainer.groups,
        divisor_ahead=weight_ahead(trainer, batches, known, progress),
        head_weights=head_weights(trainer.selector, known),
    )

    updated, grad_norm = update_weights(trainer.optimizer, learning_rate)
    measured: MetricSums = {
        **trainer.selector.finish_step(progress),
        **pop_router_metrics(trainer.models, trainer.groups),
    }
    for report in reports:
        measured = add(measured, report)
    return StepReport(updated, grad_norm, measured)


def selected_loss(
    selector: TokenSelector, known: list[Known] | None, progress: TrainingProgress
) -> LossFunction:
    """The loss function of one micro-batch: choose, then sum the chosen tokens' losses; the division comes at the end of the step."""

    def loss_function(index: int, batch: Batch, output):
        if selector.head_on_selected_rows:  # the head has summed what it was told to
            (loss_sum, loss_BS), (selection, outputs) = output, known[index]
            outputs = outputs or {"loss": loss_BS}
        else:
            outputs = split_outputs(output, selector.extras)
            selection = (
                selector.choose(batch, outputs, progress)
                if known is None
                else known[index].selection
            )
            # where, not only times: a NaN outside the selection times 0 would still be NaN.
            loss_sum = (
                torch.where(selection.mask, outputs["loss"], 0.0).mul(selection.weights).sum()
            )
        return (
            loss_sum,
            selection.weight_sum,
            selector.describe(batch, outputs, selection, progress),
        )

    return loss_function


def head_weights(
    selector: TokenSelector, known: list[Known] | None
) -> list[torch.Tensor | None] | None:
    """Per micro-batch, the weights of the tokens whose rows the head computes (last stage only); None = it computes every token."""
    if not selector.head_on_selected_rows:
        return None
    return [choice and choice.selection.weights for choice in known]


def score_with_reference(trainer: Trainer, batches: Sequence[Batch]) -> None:
    """Run an online reference over the step's micro-batches; its losses become the batches' reference columns."""
    if trainer.reference is None:
        return
    outputs = forward_losses(
        trainer.reference, batches, trainer.groups, extras=trainer.reference_extras
    )
    # Only the last stage has outputs, and only there are the batches' columns read.
    for batch, output in zip(batches, outputs, strict=trainer.groups.is_last_stage):
        batch.columns.update({f"reference_{name}": value for name, value in output.items()})


def choose_before_backward(
    trainer: Trainer, batches: Sequence[Batch], progress: TrainingProgress
) -> list[Known] | list[None] | None:
    """What must or may be chosen before the training pass; None when each micro-batch chooses from its own losses, in that pass.

    Scope global_batch: every loss of the step by a forward pass first, then one choice over all of them. 1F1B runs the backward of
    micro-batch i before the forward of j, so one pass cannot know the step's threshold
    (docs/method.md#point-7). A static scorer reads stored columns only: no forward pass, whatever
    the scope. One Known per micro-batch on the last stage, where selection lives; None elsewhere.
    """
    selector = trainer.selector
    if not (selector.needs_whole_step or selector.head_on_selected_rows):
        return None
    outputs = [{} for _ in batches]
    if not selector.scorer.is_static:
        outputs = forward_losses(trainer.models, batches, trainer.groups, extras=selector.extras)
    if not trainer.groups.is_last_stage:
        return [None] * len(batches)
    return [
        Known(*pair)
        for pair in zip(selector.choose_step(batches, outputs, progress), outputs, strict=True)
    ]


def weight_ahead(
    trainer: Trainer,
    batches: Sequence[Batch],
    known: list[Known] | None,
    progress: TrainingProgress,
) -> torch.Tensor | None:
    """What this rank will add to the divisor (float64, 0-d; meant on the last stage): the auxiliary losses of experts are scaled by it before backward.

    None for a model without such losses.
    """
    if not trainer.selector.weight_needed_ahead:
        return None
    if not trainer.groups.is_last_stage:
        return torch.zeros((), dtype=torch.float64, device=trainer.groups.device)
    if known is not None:
        return sum(choice.selection.weight_sum for choice in known)
    return sum(trainer.selector.weight_ahead(batch, progress) for batch in batches)
