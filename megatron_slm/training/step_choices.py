"""What a step computes before its training pass: reference losses, selections that are already
known, and the divisor where experts need it.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_slm.data.batch import Batch
from megatron_slm.model.decoder import HeadChoice
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.selection import Selection, TrainingProgress
from megatron_slm.training.trainer import Trainer


@dataclass(frozen=True)
class StepChoices:
    """Selections made before the training pass, one per micro-batch.

    Both lists are empty off the last pipeline stage, where no losses are and nothing is selected.
    """

    selections: list[Selection] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    """The forward pass's values of every token, among them "loss"; {} for each micro-batch of a
    static scorer, which needs no forward pass.
    """

    @property
    def for_head(self) -> list[HeadChoice]:
        """The same, one per micro-batch, for a head that computes the chosen tokens only."""
        return [
            HeadChoice(selection.weights, selection.mask, selection.tokens_here)
            for selection in self.selections
        ]


def with_reference_losses(trainer: Trainer, batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches with an online reference's losses among their columns.

    Only the last pipeline stage has outputs, and only there are the batches' columns read.
    """
    if trainer.reference is None:
        return list(batches)
    outputs = forward_losses(
        trainer.reference, batches, trainer.groups, extras=trainer.reference_extras
    )
    if not trainer.groups.is_last_stage:
        return list(batches)
    return [
        replace(batch, columns=batch.columns | _reference_columns(output))
        for batch, output in zip(batches, outputs, strict=True)
    ]


def _reference_columns(output: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"reference_{name}": value_BS for name, value_BS in output.items()}


def select_before_backward(
    trainer: Trainer, batches: Sequence[Batch], progress: TrainingProgress
) -> StepChoices | None:
    """Selections that are already known before the forward-backward pass (scope global_batch, or a
    static scorer); None if each micro-batch selects from its own losses in that pass.

    Scope global_batch: every loss of the step by a forward pass first, then one choice over all of
    them. 1F1B runs the backward of micro-batch i before the forward of j, so one pass cannot know
    the step's threshold (docs/method.md#point-7). A static scorer reads stored columns only: no
    forward pass, whatever the scope.
    """
    selector = trainer.selector
    whole_step = selector.rules.needs_whole_step(weight_needed_ahead=trainer.weight_needed_ahead)
    if not (whole_step or selector.head_on_selected_rows):
        return None
    outputs: list[dict[str, Tensor]] = [{} for _ in batches]
    if not selector.scorer.is_static:
        outputs = forward_losses(trainer.models, batches, trainer.groups, extras=selector.extras)
    if not trainer.groups.is_last_stage:
        return StepChoices()
    return StepChoices(selector.choose_step(batches, outputs, progress), outputs)


def divisor_ahead(
    trainer: Trainer,
    batches: Sequence[Batch],
    choices: StepChoices | None,
    progress: TrainingProgress,
) -> Tensor | None:
    """This rank's contribution to the loss divisor (float64, 0-d), computed before backward because
    auxiliary losses of experts are scaled by it. Meaningful on the last pipeline stage only.

    None for a model without such losses.
    """
    if not trainer.weight_needed_ahead:
        return None
    divisor = torch.zeros((), dtype=torch.float64, device=trainer.groups.device)
    if trainer.groups.is_last_stage:
        if choices is not None:
            weight_sums = [selection.weight_sum for selection in choices.selections]
        else:
            weight_sums = [trainer.selector.weight_ahead(batch, progress) for batch in batches]
        for weight_sum in weight_sums:
            divisor = divisor + weight_sum
    return divisor
