"""Steps whose gradient is not finite: skipped as far as the configuration allows, and written down
with their data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_slm.data.batch import Batch
from megatron_slm.training.ending import NonFiniteLoss
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.step import StepReport
from megatron_slm.training.step_data import write_step_data

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
        """After every step, on every rank. Raises NonFiniteLoss when more steps in a row than
        configured were not finite.
        """
        if not self.is_fault(report, loss_scale):
            if math.isfinite(report.grad_norm):
                self.in_a_row = 0
            return
        self.in_a_row += 1
        written = self._write_down(batches)
        fault = f"the gradient norm of step {self.run.step} is {report.grad_norm}"
        if self.in_a_row <= self.allowed:
            self.run.reporter.message(
                f"{fault}: the step is skipped ({self.in_a_row} of at most {self.allowed} in a "
                f"row, optimizer.max_non_finite_steps). Its data: {written}",
                "warning",
            )
            return
        # What is being written in the background is the last good state.
        with self.run.watchdog.phase("finishing"), self.run.tools.patient():
            self.run.store.close()
        raise NonFiniteLoss(
            f"{fault}: training diverged. Its data: {written}. Look at them, restart from the last "
            "checkpoint with a lower optimizer.learning_rate or a longer warm-up, or let single "
            "steps be skipped with optimizer.max_non_finite_steps"
        )

    def _write_down(self, batches: Sequence[Batch]) -> Path:
        """Write every data-parallel rank's sequences of the step; returns the folder.

        Their losses come from one more forward pass (two with an online reference).
        """
        run = self.run
        folder = run.folder / FOLDER / f"step_{run.step:08d}"
        # The loader counts the samples that it has returned; the last ones belong to this step.
        first_sample = run.loader.consumed_samples - run.loader.global_batch_size
        write_step_data(run, folder, batches, first_sample)
        return folder
