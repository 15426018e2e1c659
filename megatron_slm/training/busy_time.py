"""What each rank does with its time, and which one keeps the others waiting.

A thread looks at the main thread's stack at a fixed interval: the innermost known function tells
the phase, and a stack that ends in a collective, or waits for the device, is not the rank's own
work. Collectives of megatron-core, of torch and of this library are thus distinguished from work
without a timer around each.

On a GPU the host runs ahead of the device, so the time of forward and backward is taken from two
events on the device instead: the start of the step and the start of the gradients' reduction. Under
tensor, context and pipeline parallelism the ranks of one model wait for each other in between, so
there the events identify the slow model, not the slow rank within it.
"""

import linecache
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.monitoring.slow_ranks import (
    CHECKPOINT,
    COMPUTE,
    DATA,
    OPTIMIZER,
    OTHER,
    PHASES,
    VALIDATION,
    SlowRanks,
)
from megatron_slm.training.run_parts import RunParts

SAMPLE_SECONDS = 0.02
PHASE_OF_FUNCTION = {
    ("data/loader.py", "next_step"): DATA,
    ("data/loader.py", "fault"): DATA,
    ("training/step.py", "train_step"): COMPUTE,
    ("model/optimizer.py", "update_weights"): OPTIMIZER,
    ("training/saved_state.py", "save"): CHECKPOINT,
    ("checkpoint/store.py", "finish_pending"): CHECKPOINT,
    ("training/evaluate.py", "validate"): VALIDATION,
}
"""(file in the library, function): what a rank does while it is in there."""
WAITING = "waiting for others"
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_WAITING_CALLS = (".wait(", ".item()", ".tolist()", ".cpu()", "synchronize(")
"""A stack whose innermost line has one of these waits for a collective or for the device."""


class BusyTime:
    """Adds up, by phase, the time that the creating thread spends on its own work."""

    def __init__(self) -> None:
        self._watched = threading.get_ident()
        self._seconds = dict.fromkeys([*PHASES, WAITING], 0.0)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="busy-time", daemon=True)
        self._known: dict[CodeType, str | None] = {}

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def take(self) -> list[float]:
        """Seconds in each of PHASES since the last call."""
        with self._lock:
            taken = self._seconds
            self._seconds = dict.fromkeys(taken, 0.0)
        return [taken[phase] for phase in PHASES]

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(SAMPLE_SECONDS):
            # sys._current_frames is the only way to read another thread's stack.
            frame = sys._current_frames().get(self._watched)
            if frame is None:
                return
            phase = self.phase_of(frame)
            del frame
            now = time.monotonic()
            with self._lock:
                self._seconds[phase] += now - before
            before = now

    def phase_of(self, frame: FrameType) -> str:
        """What a stack is doing: one of PHASES, or WAITING."""
        # A frame at an instruction of no line, which the compiler has added, has the number None.
        number: int | None = frame.f_lineno
        line = linecache.getline(frame.f_code.co_filename, number) if number else ""
        if any(call in line for call in _WAITING_CALLS):
            return WAITING
        above: FrameType | None = frame
        while above is not None:
            if phase := self._phase_of_code(above.f_code):
                return phase
            above = above.f_back
        return OTHER

    def _phase_of_code(self, code: CodeType) -> str | None:
        if code not in self._known:
            path = Path(code.co_filename)
            place = ("/".join(path.parts[-2:]), code.co_name)
            in_collective = code.co_filename.endswith(_COLLECTIVES)
            self._known[code] = WAITING if in_collective else PHASE_OF_FUNCTION.get(place)
        return self._known[code]


class DeviceTime:
    """Seconds of a GPU from the start of each step to the start of its gradients' reduction.

    models: the chunks of this rank, wrapped by megatron-core's DistributedDataParallel.
    """

    def __init__(self, models: Sequence[Any]):
        self.seconds = 0.0
        self._begun: torch.cuda.Event | None = None
        self._reduced: torch.cuda.Event | None = None
        models[0].finish_grad_sync = self._noting(models[0].finish_grad_sync)

    def step_begins(self) -> None:
        """The device has finished the previous step: its gradient norm has been read."""
        if self._begun is not None and self._reduced is not None:
            self.seconds += self._begun.elapsed_time(self._reduced) / 1000
        self._begun, self._reduced = torch.cuda.Event(enable_timing=True), None
        self._begun.record()

    def take(self) -> float:
        """Seconds since the last call, without the step that is still running."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def _noting(self, finish_grad_sync: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any, **named: Any) -> None:
            if self._reduced is None:
                self._reduced = torch.cuda.Event(enable_timing=True)
                self._reduced.record()
            finish_grad_sync(*arguments, **named)

        return noted


class SlowRankReport:
    """Compares the ranks at every log line; one gather of a few numbers. A context manager.

    Every rank of the job has one, and calls it at the same places. Alone, a rank compares nothing.
    """

    def __init__(self, run: RunParts):
        self._run, self._step = run, run.step
        groups = run.groups
        self._taken_at = time.monotonic()
        self._busy = BusyTime()
        self._device: DeviceTime | None = None
        self._ranks: SlowRanks | None = None
        if groups.world_size == 1:
            return
        ranks_seen: list[Any] = [None] * groups.world_size
        dist.all_gather_object(ranks_seen, (socket.gethostname(), groups.pp_rank))
        hosts, stages = zip(*ranks_seen, strict=True)
        self._ranks = SlowRanks(hosts, stages)
        if groups.device.type == "cuda":
            self._device = DeviceTime(run.trainer.models)

    def __enter__(self) -> "SlowRankReport":
        self._taken_at = time.monotonic()
        if self._ranks is not None:
            self._busy.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._ranks is not None:
            self._busy.close()

    def step_begins(self) -> None:
        if self._device is not None:
            self._device.step_begins()

    def interval(self) -> dict[str, float]:
        """Metrics of the steps since the last call, on the rank that logs, which also warns."""
        run = self._run
        steps = run.step - self._step
        now = time.monotonic()
        seconds = now - self._taken_at
        self._step, self._taken_at = run.step, now
        if self._ranks is None or not steps:
            return {}
        busy_P = self._busy.take()
        if self._device is not None:
            busy_P[PHASES.index(COMPUTE)] = self._device.take()
        own_1P = torch.tensor([busy_P], dtype=torch.float64, device=run.groups.device)
        every_RP = own_1P.new_empty(run.groups.world_size, len(PHASES))
        dist.all_gather_into_tensor(every_RP, own_1P)
        if not run.groups.is_logger:
            return {}
        metrics, warning = self._ranks.look(every_RP.tolist(), seconds, steps)
        if warning is not None:
            run.reporter.message(warning, "warning")
        return metrics
