"""A shorter timeout for the collectives of a training step than for those around it.

The first step compiles, connects and allocates, and a checkpoint waits for the slowest disk:
device.timeout_minutes allows for those. In a later step a rank that keeps the others waiting for
minutes will not come back, and every minute until the job ends is lost.
"""

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_slm.config.schema import Config


class StepTimeout:
    """Lowers the timeout of all process groups after the first step; `lifted` puts it back.

    The lower one is device.step_timeout_minutes, but at least twice monitoring.hang_seconds and
    three times the first step: a run that hangs is ended by its watchdog, with stacks and an exit
    code of its own, and the timeout is for what the watchdog cannot see.
    """

    def __init__(self, config: Config, set_timeout: Callable[[float], None] | None = None):
        """set_timeout: called with seconds; None = set the timeout of every process group."""
        self.whole_seconds = 60.0 * config.device.timeout_minutes
        self.wanted_seconds = 60.0 * config.device.step_timeout_minutes
        self.least_seconds = 2.0 * config.monitoring.hang_seconds
        if not config.monitoring.hang_seconds:  # the run is being debugged
            self.wanted_seconds = 0.0
        self.seconds = self.whole_seconds
        self._set_timeout = set_timeout or set_collective_timeout
        self._began_at = 0.0
        self._first_step_is_done = False

    def __enter__(self) -> "StepTimeout":
        self._began_at = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._change_to(self.whole_seconds)

    def after_step(self) -> None:
        """Called after every step; the first step of this start determines the timeout."""
        if self._first_step_is_done or not self.wanted_seconds:
            return
        self._first_step_is_done = True
        first_step_seconds = time.monotonic() - self._began_at
        lower_seconds = max(self.wanted_seconds, self.least_seconds, 3 * first_step_seconds)
        self._change_to(min(lower_seconds, self.whole_seconds))

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The block (validation, a checkpoint) may take device.timeout_minutes."""
        lower_seconds = self.seconds
        self._change_to(self.whole_seconds)
        try:
            yield
        finally:
            self._change_to(lower_seconds)

    def _change_to(self, seconds: float) -> None:
        if seconds != self.seconds:
            self.seconds = seconds
            self._set_timeout(seconds)


def set_collective_timeout(seconds: float) -> None:
    """How long every later collective of this process may wait, in each of its groups."""
    for group in list(distributed_c10d._world.pg_map):
        if isinstance(group, dist.ProcessGroup):
            distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
