"""What a loss that jumped was computed on: the losses of the log interval's steps, and the data of
the worst of them.

The alarm comes at a log line, when the batches of the interval are gone. Therefore each step
records its losses and its position in the data (a few bytes), and the batch of the worst step is
read again.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.selection.metric_sums import MetricSums
from megatron_slm.training.data_fault import DataFault, read_together
from megatron_slm.training.rank_batches import on_this_rank
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.step_data import write_step_data

FOLDER = "loss_spikes"
WRITTEN_AT_MOST = 20
"""Spikes in one run folder: each costs a forward pass and a few files."""
LOSSES = ("loss/all", "loss/selected")
"""The loss that is watched is the first of these that is computed."""


class _Step(NamedTuple):
    """One step of the interval. loss: sum and count of this rank, not on every rank."""

    number: int
    first_sample: int
    loss: tuple[torch.Tensor, torch.Tensor] | None


class SpikeData:
    """The steps since the last log line. Every rank of the job calls it at the same places."""

    def __init__(self, run: RunParts):
        self.run = run
        self._steps: list[_Step] = []

    def step_done(self, measured: MetricSums) -> None:
        """After every step whose sums are of use."""
        loss = next((measured[name] for name in LOSSES if name in measured), None)
        loader = self.run.loader
        first_sample = loader.consumed_samples - loader.global_batch_size
        self._steps.append(_Step(self.run.step, first_sample, loss))

    def end_interval(self, spike: str | None) -> None:
        """Called at every log line; a new interval begins.

        spike: the alarm of this line, or None. Only the alarm of the rank that logs counts; that
        rank reports it with the folder of the data.
        """
        where = self._write_down(spike)
        if spike is not None:
            self.run.reporter.message(f"{spike}{where}", "warning")

    def _write_down(self, spike: str | None) -> str:
        """Write the data of the worst step after a spike; returns the end of the message, or ""."""
        steps, self._steps = self._steps, []
        run = self.run
        wanted = torch.tensor(
            int(spike is not None and bool(steps) and self._has_room()), device=run.groups.device
        )
        dist.broadcast(wanted, src=run.groups.world_size - 1)
        if not wanted.item():
            return ""
        losses = self._losses(steps)
        worst = steps[int(losses.argmax())]
        folder = run.folder / FOLDER / f"step_{worst.number:08d}"
        try:
            read = partial(run.loader.read_step, worst.first_sample)
            batches = on_this_rank(read_together(read, run.groups.device), run.groups)
        except DataFault as fault:
            return f". The data of step {worst.number} could not be read again: {fault}"
        write_step_data(run, folder, batches, worst.first_sample)
        if run.groups.is_logger:
            self._write_losses(steps, losses)
        return (
            f". Of the interval's steps, {worst.number} had the largest loss, "
            f"{losses.max():.3f}; its data: {folder}"
        )

    def _has_room(self) -> bool:
        return len(list((self.run.folder / FOLDER).glob("step_*"))) < WRITTEN_AT_MOST

    def _losses(self, steps: list[_Step]) -> torch.Tensor:
        """The loss of every step, the same on every rank."""
        groups = self.run.groups
        sums = torch.zeros(len(steps), 2, dtype=torch.float64, device=groups.device)
        if groups.is_last_stage:
            for row, step in zip(sums, steps, strict=True):
                if step.loss is not None:
                    row.copy_(torch.stack([value.double() for value in step.loss]))
            dist.all_reduce(sums, group=groups.dp_cp)
        dist.broadcast(sums, src=groups.world_size - 1)
        return (sums[:, 0] / sums[:, 1].clamp(min=1)).cpu()

    def _write_losses(self, steps: list[_Step], losses: torch.Tensor) -> None:
        """losses.json beside the data: every step of the interval with its loss."""
        rows = [
            {"step": step.number, "first_sample": step.first_sample, "loss": loss}
            for step, loss in zip(steps, losses.tolist(), strict=True)
        ]
        worst = steps[int(losses.argmax())].number
        path = self.run.folder / FOLDER / f"step_{worst:08d}" / "losses.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(path, rows)
        except OSError as error:
            self.run.reporter.message(f"{path} could not be written ({error})", "warning")
