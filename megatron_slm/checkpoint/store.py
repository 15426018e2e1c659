"""Save and load training state through megatron-core's dist_checkpointing, in any layout, whatever
the layout that saved it.

A save is written into a folder with a temporary name, checksummed, and renamed, so a reader never
sees a half-written checkpoint, and nothing complete is removed before something newer is complete.
Every rank of the job calls save and load together.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_slm.checkpoint.agreement import (
    all_ranks,
    damaged_files_of,
    first_problem,
    sum_over_ranks,
)
from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    complete,
    complete_checkpoints,
    settle_on,
    step_folder,
    step_of,
    tidy,
    writing_folder,
)
from megatron_slm.checkpoint.loading import load_state
from megatron_slm.checkpoint.optimizer_state import (
    Placement,
    adam_steps,
    sharded_optimizer_state,
    take_loaded_state,
)
from megatron_slm.checkpoint.random_state import layout_of, random_state, restore_random_state
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.weights import (
    Models,
    finish_overlapped_gather,
    sharded_weights,
    take_weights,
)
from megatron_slm.checkpoint.writing import (
    RankWriter,
    Written,
    describe_exception,
    plan_save,
    prepare_folder,
)
from megatron_slm.files.plain import read_json_object
from megatron_slm.parallel import Groups


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    writer: RankWriter
    info: CheckpointInfo
    trainer: dict[str, Any]
    begun_at: float


class CheckpointStore:
    """Saves and loads the checkpoints of one run folder.

    `report(text, level)` is called when a checkpoint is complete, damaged or skipped; level is
    "info", "warning" or "error".
    """

    def __init__(
        self,
        run_folder: str | Path,
        groups: Groups,
        *,
        retention: Retention | None = None,
        asynchronous: bool = False,
        report: Callable[[str, str], None] = lambda text, level: None,
    ):
        self.checkpoints = Path(run_folder) / "checkpoints"
        self.groups = groups
        self.retention = retention or Retention()
        self.asynchronous = asynchronous
        self.report = report
        self.pending: _Pending | None = None
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this job loaded or completed."""
        self.failed_saves = 0
        """Saves that failed since the last one that was completed."""

    def save(
        self,
        models: Models,
        optimizer: MegatronOptimizer | None,
        info: CheckpointInfo,
        trainer: dict[str, Any],
    ) -> None:
        """Write the checkpoint of `info.step`; `optimizer=None` saves weights only. An asynchronous
        save only begins here.

        A save that fails on any rank (a full disk, say) is reported and removed on all; the older
        checkpoints stay. Whether training goes on is for the caller to decide and to report. An
        error inside a collective cannot be agreed on: it is raised, and the job ends.
        """
        self.finish_pending(wait=True)
        begun_at = time.monotonic()
        writing = writing_folder(self.checkpoints, info.step)
        problem = first_problem(prepare_folder(writing))
        if problem:
            self._give_up(info.step, problem)
            return
        state, _ = self._state(models, optimizer, for_loading=False)
        writer = plan_save(state, writing, self.groups.dp_cp)
        problem = first_problem(writer.start())
        if problem:
            writer.abandon()
            dist.barrier()  # after this collective no rank writes any more
            self._give_up(info.step, problem)
            return
        self.pending = _Pending(writer, info, trainer, begun_at)
        if self.asynchronous:
            self.report(f"checkpoint of step {info.step}: writing in the background", "info")
        else:
            self.finish_pending(wait=True)

    def finish_pending(self, *, wait: bool = False) -> None:
        """Complete a background save that is written on every rank (or `wait` for it).

        Every rank calls it at every step.
        """
        pending = self.pending
        if pending is None:
            return
        if not (wait or all_ranks(pending.writer.is_written(), self.groups.device)):
            return
        self.pending = None
        step = pending.info.step
        written, problem = pending.writer.collect()
        problem = first_problem(problem)
        if not problem:
            problem = first_problem(self._complete(pending, written))
        if problem:
            self._give_up(step, problem)
            return
        self.saved_step = step
        self.failed_saves = 0
        seconds = time.monotonic() - pending.begun_at
        megabytes = sum_over_ranks(written.size_bytes, self.groups.device) / 1e6
        background = " in the background" if self.asynchronous else ""
        self.report(
            f"checkpoint of step {step} is complete: {step_folder(self.checkpoints, step)} "
            f"({megabytes:.1f} MB in {seconds:.1f} s{background})",
            "info",
        )
        self._on_rank_0(partial(self.retention.apply, self.checkpoints))

    def close(self) -> None:
        """Wait for background saves."""
        self.finish_pending(wait=True)

    def load_latest(
        self, models: Models, optimizer: MegatronOptimizer | None
    ) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint into models and optimizer; returns its trainer
        state, None when there is none.

        A damaged checkpoint is reported with its damaged files and renamed, so that it is not taken
        for the newest; the one before it is loaded. The pointer `latest` is corrected.
        """
        self._on_rank_0(partial(tidy, self.checkpoints))
        damaged: list[Path] = []
        for candidate in reversed(complete_checkpoints(self.checkpoints)):
            files = damaged_files_of(candidate)
            if not files:
                trainer = self.load(candidate, models, optimizer)
                self.saved_step = step_of(candidate)
                self._on_rank_0(partial(settle_on, candidate, damaged))
                return trainer
            damaged.append(candidate)
            self.report(
                f"checkpoint {candidate} is damaged ({', '.join(files)}: missing, no plain file, "
                "or content that differs from its checksum); trying the one before it",
                "error",
            )
        return None

    def load(
        self, checkpoint: Path, models: Models, optimizer: MegatronOptimizer | None
    ) -> dict[str, Any]:
        """Load one checkpoint, saved in any layout, into models (and optimizer); returns its
        trainer state.

        ValueError when it has no optimizer state and `optimizer` is given.
        """
        trainer = read_json_object(checkpoint, "trainer.json")
        if optimizer is not None and trainer.get("weights_only", False):
            raise ValueError(
                f"{checkpoint} holds weights only (checkpoint.save_optimizer was false, or it was "
                "imported), so no run goes on from it; to train from its weights, give another "
                "run.folder and set checkpoint.initialize_from to it"
            )
        same_layout = trainer["layout"] == layout_of(self.groups)
        state, placements = self._state(
            models, optimizer, for_loading=True, with_random=same_layout
        )
        loaded = load_state(state, checkpoint, self.groups)
        take_weights(models, loaded)
        if optimizer is not None:
            take_loaded_state(placements, loaded["optimizer"], trainer["adam_steps"])
        if same_layout:
            restore_random_state(loaded["random"], checkpoint)
        return trainer

    def _state(
        self,
        models: Models,
        optimizer: MegatronOptimizer | None,
        *,
        for_loading: bool,
        with_random: bool = True,
    ) -> tuple[dict[str, Any], list[Placement]]:
        """The sharded state dict, and where the optimizer's part of it belongs."""
        if not for_loading:
            finish_overlapped_gather(models)
        state = sharded_weights(models)
        placements: list[Placement] = []
        if optimizer is not None:
            state["optimizer"], placements = sharded_optimizer_state(
                optimizer, dict(state), for_loading=for_loading
            )
        if with_random:
            state["random"] = random_state(self.groups)
        return state, placements

    def _complete(self, pending: _Pending, written: Written) -> str:
        """Let rank 0 describe, checksum and rename what was written; returns what went wrong."""
        if dist.get_rank() != 0:
            dist.gather_object(written, None, dst=0)
            return ""
        by_rank = [Written()] * dist.get_world_size()
        dist.gather_object(written, by_rank, dst=0)
        step = pending.info.step
        try:
            checksums = pending.writer.finish(writing_folder(self.checkpoints, step), by_rank)
            complete(self.checkpoints, step, pending.info, pending.trainer, checksums)
        except Exception as error:  # any type: the other ranks wait for this rank's result
            return describe_exception(error)
        return ""

    def _on_rank_0(self, action: Callable[[], object]) -> None:
        """Do something to the folder on rank 0 while the others wait. A failure is reported, and
        stops nothing.
        """
        problem = ""
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                problem = describe_exception(error)
        problem = first_problem(problem)
        if problem:
            self.report(f"{self.checkpoints} could not be tidied ({problem})", "warning")

    def _give_up(self, step: int, problem: str) -> None:
        """Remove what was written of a checkpoint, and report why."""
        self.failed_saves += 1
        if dist.get_rank() == 0:
            shutil.rmtree(writing_folder(self.checkpoints, step), ignore_errors=True)
        self.report(
            f"checkpoint of step {step} could not be saved ({problem}); older checkpoints are "
            "intact: free space or fix the folder",
            "error",
        )


def trainer_state(
    optimizer: MegatronOptimizer | None, groups: Groups, **fields: Any
) -> dict[str, Any]:
    """What trainer.json holds: the layout, whether optimizer state is missing, Adam's number of
    updates, and the trainer's own `fields`.
    """
    return {
        "layout": layout_of(groups),
        "weights_only": optimizer is None,
        "adam_steps": adam_steps(optimizer) if optimizer is not None else 0,
        **fields,
    }
