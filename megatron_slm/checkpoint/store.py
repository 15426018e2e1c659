"""Save and load training state through megatron-core's dist_checkpointing: any layout saves, any layout loads.

A save is written aside, checksummed, and renamed; a reader never sees a half-written checkpoint, and nothing complete
is removed before something newer is complete. Every rank of the job calls save and load together.
"""

import shutil
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy, get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper, FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model

from megatron_slm.checkpoint import folder as folders
from megatron_slm.checkpoint.folder import CheckpointInfo
from megatron_slm.checkpoint.optimizer_state import adam_steps, sharded_optimizer_state, take_loaded_state
from megatron_slm.parallel import Groups


class CheckpointStore:
    """Saves and loads the checkpoints of one run folder.

    `report(text, level)` is told when a checkpoint is complete, damaged or skipped; level "info", "warning" or "error".
    """

    def __init__(self, run_folder: str | Path, groups: Groups, *, keep_last: int = 3, keep_every_steps: int = 0,
                 asynchronous: bool = False, report: Callable[[str, str], None] = lambda text, level: None):
        self.checkpoints = Path(run_folder) / "checkpoints"
        self.groups, self.keep_last, self.keep_every_steps, self.report = groups, keep_last, keep_every_steps, report
        self.queue = AsyncCallsQueue() if asynchronous else None

    def save(self, models: list, optimizer, info: CheckpointInfo, trainer: dict) -> None:
        """Write the checkpoint of `info.step`; `optimizer=None` saves weights only. Asynchronous saves only begin here.

        A failed save (a full disk, say) is reported and removed; training goes on with the older checkpoints intact.
        """
        self.finish_pending(wait=True)
        writing = folders.writing_folder(self.checkpoints, info.step)
        problem = self._prepare(writing)
        if not problem:
            try:
                state = self._state(models, optimizer, for_loading=False)[0]
                strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), self.groups.dp_cp)
                request = dist_checkpointing.save(state, str(writing), strategy, validate_access_integrity=True,
                                                  async_sharded_save=self.queue is not None)
                if self.queue is not None:
                    request.add_finalize_fn(lambda: self._complete(info, trainer))
                    self.queue.schedule_async_request(request)
                    self.report(f"checkpoint of step {info.step}: writing in the background", "info")
                    return
            except Exception as error:      # whatever storage raises; every rank learns of it in _agree
                problem = f"{type(error).__name__}: {error}"
        problem = self._agree(problem)
        if problem:
            self._give_up(writing, info.step, problem)
        else:
            self._complete(info, trainer)

    def finish_pending(self, *, wait: bool = False) -> None:
        """Complete background saves that are done (all of them when `wait`); call it every step, on every rank."""
        if self.queue is None:
            return
        try:
            self.queue.maybe_finalize_async_calls(blocking=wait)
        except Exception as error:
            self.report(f"a background checkpoint failed ({type(error).__name__}: {error}); older checkpoints are intact", "error")
            self.queue = AsyncCallsQueue()

    def close(self) -> None:
        """Wait for background saves."""
        self.finish_pending(wait=True)

    def load_latest(self, models: list, optimizer) -> dict | None:
        """Load the newest undamaged checkpoint into models and optimizer; returns its trainer state, None when there is none.

        A damaged one is named, with the damaged file, and the one before it is taken.
        """
        if dist.get_rank() == 0:
            folders.restore_replaced(self.checkpoints)
        dist.barrier()
        for candidate in reversed(folders.complete_checkpoints(self.checkpoints)):
            damaged = self._damaged(candidate)
            if not damaged:
                return self.load(candidate, models, optimizer)
            self.report(f"checkpoint {candidate} is damaged ({', '.join(damaged)}: content differs from its checksum); trying the one before it", "error")
        return None

    def load(self, checkpoint: Path, models: list, optimizer) -> dict:
        """Load one checkpoint, saved under any layout, into models (and optimizer); returns its trainer state."""
        import json
        trainer = json.loads((checkpoint / "trainer.json").read_text())
        same_layout = trainer["layout"] == layout_of(self.groups)
        state, placements = self._state(models, optimizer, for_loading=True, with_random=same_layout)
        strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(checkpoint)), self.groups.dp_cp)
        loaded = dist_checkpointing.load(state, str(checkpoint), strategy)
        _take_weights(models, loaded)
        if optimizer is not None:
            take_loaded_state(optimizer, placements, loaded["optimizer"], trainer["adam_steps"])
        if same_layout:
            _take_random(loaded["random"])
        return trainer

    def _state(self, models, optimizer, *, for_loading: bool, with_random: bool = True):
        if not for_loading:
            _finish_overlapped_gather(models)
        chunks = unwrap_model(models)
        state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
        placements = []
        if optimizer is not None:
            with_parameters = {key: part for key, part in state.items()}
            state["optimizer"], placements = sharded_optimizer_state(optimizer, with_parameters, for_loading=for_loading)
        if with_random:
            state["random"] = _random_state(self.groups)
        return state, placements

    def _prepare(self, writing: Path) -> str:
        problem = ""
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir(parents=True)
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        return self._agree(problem)

    def _agree(self, problem: str) -> str:
        """The first problem any rank had, on all ranks."""
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        return next((text for text in problems if text), "")

    def _complete(self, info: CheckpointInfo, trainer: dict) -> None:
        """Checksum (each rank its own files), describe, rename, retire old checkpoints."""
        writing = folders.writing_folder(self.checkpoints, info.step)
        problem, own = "", {}
        try:
            files = sorted(path.name for path in writing.iterdir())
            own = {name: folders.file_sha256(writing / name) for name in files[dist.get_rank()::dist.get_world_size()]}
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        problem = self._agree(problem)
        if not problem and dist.get_rank() == 0:
            try:
                checksums = {name: digest for part in gathered for name, digest in part.items()}
                folders.complete(self.checkpoints, info.step, info, trainer, checksums)
                folders.remove_old(self.checkpoints, self.keep_last, self.keep_every_steps)
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        problem = self._agree(problem)
        if problem:
            self._give_up(writing, info.step, problem)
        else:
            self.report(f"checkpoint of step {info.step} is complete: {folders.step_folder(self.checkpoints, info.step)}", "info")

    def _give_up(self, writing: Path, step: int, problem: str) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
        self.report(f"checkpoint of step {step} could not be saved ({problem}); training goes on, older checkpoints are intact: free space or fix the folder", "error")

    def _damaged(self, checkpoint: Path) -> list[str]:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, folders.damaged_files(checkpoint, (dist.get_rank(), dist.get_world_size())))
        return sorted({name for part in found for name in part})


def layout_of(groups: Groups) -> dict:
    """The parallel sizes as plain numbers."""
    return {"tensor": groups.tp_size, "pipeline": groups.pp_size, "virtual_pipeline": groups.virtual_chunks,
            "context": groups.cp_size, "data": groups.dp_size}


def trainer_state(optimizer, groups: Groups, **state) -> dict:
    """What trainer.json holds: the layout, Adam's update count, and the trainer's own fields."""
    return {"layout": layout_of(groups), "adam_steps": adam_steps(optimizer) if optimizer is not None else 0, **state}


def load_weights(models: list, checkpoint: str | Path, groups: Groups) -> CheckpointInfo:
    """Load weights only, from a run folder or checkpoint of any layout; checks its files first (ValueError when damaged)."""
    found = folders.resolve_checkpoint(checkpoint)
    damaged = folders.damaged_files(found, (dist.get_rank(), dist.get_world_size()))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, damaged)
    damaged = sorted({name for part in gathered for name in part})
    if damaged:
        raise ValueError(f"{found}: damaged ({', '.join(damaged)}: content differs from checksums.json); use another checkpoint or copy it again")
    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(unwrap_model(models))}
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(found)), groups.dp_cp)
    _take_weights(models, dist_checkpointing.load(state, str(found), strategy))
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
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(),
             "cuda": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return ShardedObject("random", state, (groups.pp_size, groups.tp_size, groups.dp_cp.size()),
                         (groups.pp_rank, groups.tp_rank, groups.dp_cp.rank()), replica_id=0)


def _take_random(state: dict) -> None:
    import random
    import numpy as np
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
