"""Save and load training state through megatron-core's dist_checkpointing: any layout saves, any layout loads.

A save is written aside, checksummed, and renamed; a reader never sees a half-written checkpoint, and nothing complete
is removed before something newer is complete. Every rank of the job calls save and load together.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_slm.checkpoint import folder as folders
from megatron_slm.checkpoint.folder import CheckpointInfo
from megatron_slm.checkpoint.loading import load_state
from megatron_slm.checkpoint.optimizer_state import (
    adam_steps,
    sharded_optimizer_state,
    take_loaded_state,
)
from megatron_slm.checkpoint.plain_reader import RANDOM_KEY
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.writing import RankWriter, describe_exception, plan_save
from megatron_slm.files.plain import read_json_object
from megatron_slm.parallel import Groups


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    writer: RankWriter
    info: CheckpointInfo
    trainer: dict
    begun: float


class CheckpointStore:
    """Saves and loads the checkpoints of one run folder.

    `report(text, level)` is told when a checkpoint is complete, damaged or skipped; level "info", "warning" or "error".
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
        self.groups, self.retention, self.asynchronous, self.report = (
            groups,
            retention or Retention(),
            asynchronous,
            report,
        )
        self.pending: _Pending | None = None
        self.saved_step: int | None = None
        """Of the newest checkpoint that this job loaded or completed."""
        self.failed_saves = 0
        """Saves that failed since the last one that was completed."""

    def save(self, models: list, optimizer, info: CheckpointInfo, trainer: dict) -> None:
        """Write the checkpoint of `info.step`; `optimizer=None` saves weights only. Asynchronous saves only begin here.

        A save that fails on any rank (a full disk, say) is reported and removed on all; the older
        checkpoints stay. Whether training goes on is for the caller to decide, and to say. What
        fails inside a collective cannot be agreed on: it is raised, and the job ends.
        """
        self.finish_pending(wait=True)
        begun = time.monotonic()
        writing = folders.writing_folder(self.checkpoints, info.step)
        problem = self._agree(self._prepare(writing))
        if problem:
            self._give_up(writing, info.step, problem)
            return
        writer = plan_save(
            self._state(models, optimizer, for_loading=False)[0], writing, self.groups.dp_cp
        )
        problem = self._agree(writer.start())
        if problem:
            writer.abandon()
            dist.barrier()  # nobody writes any more
            self._give_up(writing, info.step, problem)
            return
        self.pending = _Pending(writer, info, trainer, begun)
        if self.asynchronous:
            self.report(f"checkpoint of step {info.step}: writing in the background", "info")
        else:
            self.finish_pending(wait=True)

    def finish_pending(self, *, wait: bool = False) -> None:
        """Complete a background save that is written on every rank (or `wait` for it); call it every step, on every rank."""
        if self.pending is None or not (wait or self._all_ranks(self.pending.writer.is_written())):
            return
        pending, self.pending = self.pending, None
        written, problem = pending.writer.collect()
        problem = self._agree(problem)
        if not problem:
            everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(written, everyone, dst=0)
            problem = self._agree(self._complete(pending, everyone) if everyone else "")
        if problem:
            self._give_up(
                folders.writing_folder(self.checkpoints, pending.info.step),
                pending.info.step,
                problem,
            )
            return
        self.saved_step, self.failed_saves = pending.info.step, 0
        seconds, size = time.monotonic() - pending.begun, self._sum(written.size_bytes)
        self.report(
            f"checkpoint of step {pending.info.step} is complete: {folders.step_folder(self.checkpoints, pending.info.step)} "
            f"({size / 1e6:.1f} MB in {seconds:.1f} s{' in the background' if self.asynchronous else ''})",
            "info",
        )
        self._on_rank_0(lambda: self.retention.apply(self.checkpoints))

    def close(self) -> None:
        """Wait for background saves."""
        self.finish_pending(wait=True)

    def load_latest(self, models: list, optimizer) -> dict | None:
        """Load the newest undamaged checkpoint into models and optimizer; returns its trainer state, None when there is none.

        A damaged one is named, with the damaged file, and the one before it is taken; the damaged one is then set aside
        under another name, so that nothing else takes it for the newest. The latest pointer is put right.
        """
        self._on_rank_0(lambda: folders.tidy(self.checkpoints))
        damaged = []
        for candidate in reversed(folders.complete_checkpoints(self.checkpoints)):
            files = self._damaged(candidate)
            if not files:
                trainer = self.load(candidate, models, optimizer)
                self.saved_step = folders.step_of(candidate)
                self._on_rank_0(partial(folders.settle_on, candidate, damaged))
                return trainer
            damaged.append(candidate)
            self.report(
                f"checkpoint {candidate} is damaged ({', '.join(files)}: missing, no plain file, or content that differs from its "
                "checksum); trying the one before it",
                "error",
            )
        return None

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Do something to the folder on rank 0 while the others wait; a failure is reported and stops nothing."""
        problem = ""
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                problem = describe_exception(error)
        problem = self._agree(problem)
        if problem:
            self.report(f"{self.checkpoints} could not be tidied ({problem})", "warning")

    def load(self, checkpoint: Path, models: list, optimizer) -> dict:
        """Load one checkpoint, saved under any layout, into models (and optimizer); returns its trainer state. ValueError: it has no optimizer state."""
        trainer = read_json_object(checkpoint, "trainer.json")
        if optimizer is not None and trainer.get("weights_only", False):
            raise ValueError(
                f"{checkpoint} holds weights only (checkpoint.save_optimizer was false, or it was imported), so no run goes on from it; to train from "
                "its weights, give another run.folder and set checkpoint.initialize_from to it"
            )
        same_layout = trainer["layout"] == layout_of(self.groups)
        state, placements = self._state(
            models, optimizer, for_loading=True, with_random=same_layout
        )
        loaded = load_state(state, checkpoint, self.groups)
        _take_weights(models, loaded)
        if optimizer is not None:
            take_loaded_state(optimizer, placements, loaded["optimizer"], trainer["adam_steps"])
        if same_layout:
            _take_random(loaded["random"], checkpoint)
        return trainer

    def _state(self, models, optimizer, *, for_loading: bool, with_random: bool = True):
        if not for_loading:
            _finish_overlapped_gather(models)
        chunks = unwrap_model(models)
        state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        placements = []
        if optimizer is not None:
            with_parameters = dict(state)
            state["optimizer"], placements = sharded_optimizer_state(
                optimizer, with_parameters, for_loading=for_loading
            )
        if with_random:
            state["random"] = _random_state(self.groups)
        return state, placements

    def _prepare(self, writing: Path) -> str:
        """An empty folder to write in (rank 0 makes it); what went wrong."""
        if dist.get_rank() != 0:
            return ""
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        except OSError as error:
            return describe_exception(error)
        return ""

    def _complete(self, pending: "_Pending", everyone: list) -> str:
        """Describe, checksum and rename what all ranks wrote (rank 0 alone); what went wrong."""
        try:
            checksums = pending.writer.finish(
                folders.writing_folder(self.checkpoints, pending.info.step), everyone
            )
            folders.complete(
                self.checkpoints, pending.info.step, pending.info, pending.trainer, checksums
            )
        except Exception as error:  # whatever storage raises: the other ranks wait to hear of it
            return describe_exception(error)
        return ""

    def _agree(self, problem: str) -> str:
        """The first problem any rank had, on all ranks."""
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")

    def _all_ranks(self, flag: bool) -> bool:
        """Whether it is so on every rank; one 8-byte all-reduce over the world."""
        return self._sum(int(not flag)) == 0

    def _sum(self, number: int) -> int:
        total = torch.tensor(number, dtype=torch.int64, device=self.groups.device)
        dist.all_reduce(total)
        return int(total.item())

    def _give_up(self, writing: Path, step: int, problem: str) -> None:
        self.failed_saves += 1
        if dist.get_rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        self.report(
            f"checkpoint of step {step} could not be saved ({problem}); older checkpoints are intact: free space or fix the folder",
            "error",
        )

    def _damaged(self, checkpoint: Path) -> list[str]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(
            found, folders.damaged_files(checkpoint, (dist.get_rank(), dist.get_world_size()))
        )
        return sorted({name for part in found for name in part})


def layout_of(groups: Groups) -> dict:
    """The parallel sizes as plain numbers."""
    return {
        "tensor": groups.tp_size,
        "pipeline": groups.pp_size,
        "virtual_pipeline": groups.virtual_chunks,
        "context": groups.cp_size,
        "data": groups.dp_size,
    }


def trainer_state(optimizer, groups: Groups, **state) -> dict:
    """What trainer.json holds: the layout, whether there is no optimizer state, Adam's update count, and the trainer's own fields."""
    return {
        "layout": layout_of(groups),
        "weights_only": optimizer is None,
        "adam_steps": adam_steps(optimizer) if optimizer is not None else 0,
        **state,
    }


def load_weights(models: list, checkpoint: str | Path, groups: Groups) -> CheckpointInfo:
    """Load weights only, from a run folder or checkpoint of any layout; checks its files first (ValueError when damaged)."""
    found = folders.resolve_checkpoint(checkpoint)
    damaged = folders.damaged_files(found, (dist.get_rank(), dist.get_world_size()))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, damaged)
    damaged = sorted({name for part in gathered for name in part})
    if damaged:
        raise ValueError(
            f"{found}: damaged ({', '.join(damaged)}: missing, no plain file, or content that differs from checksums.json); use "
            "another checkpoint or copy it again"
        )
    state = {
        f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(unwrap_model(models))
    }
    _take_weights(models, load_state(state, found, groups))
    return folders.read_checkpoint_info(found)


def _finish_overlapped_gather(models: list) -> None:
    """Bring every rank's weights up to date: with overlap_param_gather those that other ranks updated arrive only in the next forward pass."""
    for model in models:
        if isinstance(model, DistributedDataParallel) and model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


def _take_weights(models: list, loaded: dict) -> None:
    for i, chunk in enumerate(unwrap_model(models)):
        chunk.load_state_dict(loaded[f"model{i}"], strict=True)


def _random_state(groups: Groups) -> ShardedObject:
    """This rank's random states: only dropout draws from them during training, and the same layout restores them exactly."""
    import random

    import numpy as np

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        RANDOM_KEY,
        state,
        (groups.pp_size, groups.tp_size, groups.dp_cp.size()),
        (groups.pp_rank, groups.tp_rank, groups.dp_cp.rank()),
        replica_id=0,
    )


def _take_random(state: dict, checkpoint: Path) -> None:
    """Go on with the stored random states.

    ValueError when they are none: each library checks what it is given, in its own words.
    """
    import random

    import numpy as np

    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["tracker"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint}: its random states cannot be taken up ({type(error).__name__}: {error}); use another checkpoint"
        ) from error
