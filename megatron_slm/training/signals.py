"""Requests to stop a run, by signal or by a file, on which all ranks agree at the end of a step.

srun and mpirun swallow or repeat signals, and torchrun kills its workers 30 seconds after it passed
one on, so a batch system's warning is best passed on as a file: whoever writes `stop_requested`
into the run folder makes the run save a checkpoint and leave with exit code 85 ("run me again"). A
run that is asked to stop and cannot save leaves with 4, as one does that cannot save at its end.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_slm.training.data_fault import DataFault, share_fault
from megatron_slm.training.stop_signals import STOP_FILE, StopSignals

EXIT_RESUME = 85
"""Exit code of a run that saved a checkpoint and wants to be started again."""
CHECK_STEPS = 8
CHECK_SECONDS = 5.0
"""A request takes effect after at most so many steps, and at most so many seconds or one step."""
_CANNOT_READ = 2
"""Contribution of a rank that cannot read the next step; outranks 1 (stop requested) and 0."""


class StopRequest:
    """Becomes true on every rank at the same step, once any rank got a signal or the stop file
    exists.

    The ranks do not agree after every step: an all-reduce over the world, for which all wait, would
    cost a fast step more than its own small collectives. They agree again after at most CHECK_STEPS
    steps, fewer where that many took longer than CHECK_SECONDS on the slowest rank, and never more
    than every rank has already read, so that no rank can meet a file that fails in between.

    signals: the stop signals of this process; None = only the file counts.
    """

    def __init__(
        self,
        run_folder: str | Path,
        device: torch.device,
        signals: StopSignals | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.file = Path(run_folder) / STOP_FILE
        self.device = device
        self.signals = signals
        self.fault: DataFault | None = None
        """What keeps some rank from reading the next step, the same on every rank."""
        self._clock = clock
        self._agreed_at = clock()
        self._steps_since = 0
        self._next_after = 1
        """Steps from one agreement to the next. The first step is always followed by one."""

    def is_due(self, *, last_step: bool = False) -> bool:
        """Whether the ranks agree after the step that has just been done. Call it after each.

        The same on every rank, and always true after the run's last step.
        """
        self._steps_since += 1
        return last_step or self._steps_since >= self._next_after

    def agreed(self, fault: Exception | None = None, ready_steps: int = 1) -> bool:
        """Whether to stop after this step; one small all-reduce over the world.

        Only rank 0 looks at the file. fault: why this rank cannot read the next step. If any rank
        has one, all stop, and `self.fault` holds it. ready_steps: how many of the next steps this
        rank holds in memory.
        """
        signalled = self.signals is not None and bool(self.signals.asked)
        requested = signalled or (dist.get_rank() == 0 and self.file.exists())
        request = _CANNOT_READ if fault is not None else int(requested)
        step_seconds = (self._clock() - self._agreed_at) / max(1, self._steps_since)
        shared = torch.tensor(
            [request, step_seconds, -ready_steps], dtype=torch.float64, device=self.device
        )
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        request, slowest_seconds, fewest_ready = shared.tolist()
        self._next_after = 1
        if self._steps_since:  # else nothing is known yet of how long a step takes
            self._next_after = steps_until_next(slowest_seconds, int(-fewest_ready))
        self._agreed_at = self._clock()
        self._steps_since = 0
        if request == _CANNOT_READ:
            self.fault = share_fault(fault)
        return bool(request)

    def clear(self) -> str:
        """Remove the stop file, so that the restarted run does not stop at once.

        On rank 0, returns why it could not be removed; "" = done.
        """
        if dist.get_rank() == 0:
            try:
                self.file.unlink(missing_ok=True)
            except OSError as error:  # it became read-only, which is also why nothing was saved
                return (
                    f"{self.file} could not be removed ({error}); remove it, or the next start "
                    "stops after one step"
                )
        return ""


def steps_until_next(step_seconds: float, ready_steps: int) -> int:
    """Steps after which the ranks agree again, when a step takes `step_seconds`."""
    in_time = CHECK_STEPS if step_seconds <= 0 else int(CHECK_SECONDS / step_seconds)
    return max(1, min(CHECK_STEPS, in_time, ready_steps))
