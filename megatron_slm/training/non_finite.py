"""Steps whose gradient is not finite: skipped as far as the configuration allows, and written down
with their data.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_slm.data.batch import Batch
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.training.ending import NonFiniteLoss
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.step import StepReport
from megatron_slm.training.step_choices import with_reference_losses

FOLDER = "non_finite"


class NonFiniteSteps:
    """Counts steps in a row whose gradient is not finite."""

    def __init__(self, run: RunParts):
        self.run = run
        self.allowed = run.config.optimizer.max_non_finite_steps
        self.in_a_row = 0

    def is_fault(self, report: StepReport, loss_scale: float | None) -> bool:
        """Whether the gradient is not finite for another reason than a loss scale that is too
        large.

        loss_scale: fp16's scale before the step; None under other precisions. An overflow above the
        smallest scale is no fault: the scale goes down, and the gradients are finite again.
        """
        if math.isfinite(report.grad_norm):
            return False
        return loss_scale is None or loss_scale <= self.run.config.optimizer.min_loss_scale

    def check(self, report: StepReport, batches: Sequence[Batch], loss_scale: float | None) -> None:
        """After every step, on every rank. NonFiniteLoss when there was one step too many."""
        if not self.is_fault(report, loss_scale):
            if math.isfinite(report.grad_norm):
                self.in_a_row = 0
            return
        self.in_a_row += 1
        written = self._write_down(batches)
        found = f"the gradient norm of step {self.run.step} is {report.grad_norm}"
        if self.in_a_row <= self.allowed:
            self.run.reporter.message(
                f"{found}: the step is skipped ({self.in_a_row} of at most {self.allowed} in a "
                f"row, optimizer.max_non_finite_steps). Its data: {written}",
                "warning",
            )
            return
        self.run.store.close()  # what is being written in the background is the last good state
        raise NonFiniteLoss(
            f"{found}: training diverged. Its data: {written}. Look at them, restart from the last "
            "checkpoint with a lower optimizer.learning_rate or a longer warm-up, or let single "
            "steps be skipped with optimizer.max_non_finite_steps"
        )

    def _write_down(self, batches: Sequence[Batch]) -> Path:
        """Every data-parallel rank's sequences of the step; the folder they are in.

        One more forward pass (two with an online reference) tells their losses.
        """
        run = self.run
        groups = run.groups
        folder = run.folder / FOLDER / f"step_{run.step:08d}"
        with torch.no_grad():
            batches = with_reference_losses(run.trainer, batches)
            outputs = forward_losses(run.trainer.models, batches, groups)
        if groups.is_last_stage and groups.tp_rank == 0 and groups.cp_rank == 0:
            sequences = []
            for batch, output in zip(batches, outputs, strict=True):
                for row in range(len(batch.tokens_BS)):
                    sequences.append(self._describe(batch, output["loss"], row))
            path = folder / f"data_parallel_rank_{groups.dp_rank:05d}.json"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json_atomically(path, sequences)
            except OSError as error:
                run.reporter.message(f"{folder} could not be written ({error})", "warning")
        return folder

    def _describe(self, batch: Batch, loss_BS: Tensor, row: int) -> dict[str, Any]:
        """One sequence: where it stands in its corpus, and what is not finite in it (of this
        context-parallel rank).
        """
        loader = self.run.loader
        sequence_tokens = self.run.config.data.sequence_length
        in_global_batch = int(batch.token_id_BS[row, 0]) // sequence_tokens
        # The loader counts samples handed out: the last of them are those of this step.
        sample = loader.consumed_samples - loader.global_batch_size + in_global_batch
        number, pieces = loader.dataset.pieces(sample)
        index = loader.corpus_index(number)
        columns = {"loss": loss_BS, **batch.columns}
        return {
            "corpus": str(self.run.run_inputs.corpora[number].prefix),
            "sample": sample,
            "token_ranges": [[start, end] for start, end in pieces],
            "documents": [index.document_at(start) for start, _ in pieces],
            "columns": {name: _summary(value_BS[row]) for name, value_BS in columns.items()},
        }


def _summary(value_S: Tensor) -> dict[str, float]:
    """Range and mean of the finite values, and how many are not."""
    value_S = value_S.detach().float().cpu()
    finite = value_S[value_S.isfinite()]
    summary: dict[str, float] = {"not_finite": int((~value_S.isfinite()).sum())}
    if len(finite):
        summary |= {
            "lowest": float(finite.min()),
            "mean": float(finite.mean()),
            "highest": float(finite.max()),
        }
    return summary
