"""Debugging and tuning tools of a run, behind one object that the loop calls.

None of it changes a result: a profiler, a snapshot when memory runs out, garbage collection at the
same step everywhere, a shorter timeout of collectives, and the user's function after each step.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from megatron_slm.config.schema import Config
from megatron_slm.parallel import Groups
from megatron_slm.training.garbage import GarbageCollection
from megatron_slm.training.memory_snapshot import MemorySnapshot
from megatron_slm.training.profiler import StepProfiler
from megatron_slm.training.step_timeout import StepTimeout


class TrainingTools:
    """A context manager around the steps of one start of a run; call `after_step` after each."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        *,
        done_steps: int,
        report: Callable[[str, str], None],
        hook: Callable[[int, Mapping[str, Any]], object] | None = None,
    ):
        """hook: the function of monitoring.after_step. report: where (text, level) goes."""
        folder = Path(config.run.folder)
        monitoring = config.monitoring
        self.hook = hook
        self.hook_name = monitoring.after_step
        self.garbage = GarbageCollection(config.device.garbage_collection_steps)
        self.timeout = StepTimeout(config)
        self.profiler = StepProfiler(
            monitoring.profile_steps,
            folder,
            groups.world_rank,
            done_steps=done_steps,
            report=report,
        )
        self.memory = MemorySnapshot(
            monitoring.memory_snapshot,
            groups.device,
            folder,
            rank=groups.world_rank,
            world_size=groups.world_size,
            report=report,
        )
        self._entered = ExitStack()

    def __enter__(self) -> "TrainingTools":
        with ExitStack() as entered:  # where one cannot be entered, those before it are left
            for tool in (self.memory, self.garbage, self.timeout, self.profiler):
                entered.enter_context(tool)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Called when `step` is done and its checkpoint, if one was due, is written."""
        self.timeout.after_step()
        self.profiler.after_step(step)
        self.garbage.after_step(step)
        if self.hook is None:
            return
        try:
            self.hook(step, metrics)
        except Exception as error:
            raise RuntimeError(
                f"monitoring.after_step: {self.hook_name} failed after step {step}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def patient(self) -> AbstractContextManager[None]:
        """A block, such as a checkpoint, in which collectives may take device.timeout_minutes."""
        return self.timeout.lifted()
