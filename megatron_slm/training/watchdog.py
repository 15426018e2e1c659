"""Notices a run that hangs, writes down where each rank stands, and ends it with its own exit code.

A rank that is stopped, swapped out or waits for a file server keeps all the others waiting in a
collective. Without a watchdog nothing happens for the whole `device.timeout_minutes`, and then one
rank's traceback shows only that it waited.

Every rank has a thread that knows what the rank is doing (its phase, and the last finished step)
and since when. The thread writes that to HANG_FOLDER/rank_NNNNN.json at an interval, and reads the
file of the next rank: one that no longer changes belongs to a rank that is stopped, whatever it was
doing. When that is seen, or when a phase takes longer than it may, the rank writes the Python
stacks of all its threads beside it, and ends the process with exit code 86.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_slm.monitoring import run_status

EXIT_HUNG = 86
"""Exit code of a run that ended itself because no step was finished in time."""
HANG_FOLDER = "ranks"
FIRST_STEP = "first step"
STEP = "step"


@dataclass(frozen=True)
class Whereabouts:
    """What one rank is doing."""

    rank: int
    host: str
    pid: int
    step: int
    """Finished steps."""
    phase: str
    phase_seconds: float
    """How long the phase has lasted."""
    written_at: float
    """Seconds since 1970, of this host's clock."""


class Watchdog:
    """Watches the phases of one rank. Use as a context manager around the run's loop.

    folder          the run folder.
    step_seconds    how long one step may take; 0 = nothing is watched and no thread is started.
                    Three times the longest step so far is allowed in any case.
    other_seconds   how long anything else may take: the first step (compilation, the first
                    collectives), validation, a checkpoint.
    end             called with EXIT_HUNG; os._exit, because a rank that hangs in a collective
                    cannot unwind.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        step_seconds: float,
        other_seconds: float,
        end: Callable[[int], None] = os._exit,
    ):
        self.folder = folder / HANG_FOLDER
        self.rank, self.world_size = rank, world_size
        self.step_seconds = step_seconds
        self.other_seconds = max(step_seconds, other_seconds)
        self.end = end
        self.interval_seconds = min(10.0, max(0.05, step_seconds / 10))
        self._phase, self._since, self._step = FIRST_STEP, time.monotonic(), 0
        self._longest_step_seconds = 0.0
        self._next_written_at, self._next_seen_at = 0.0, time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self.step_seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(OSError):
                self._file(self.rank).unlink(missing_ok=True)

    def step_done(self, step: int) -> None:
        """Step `step` is finished and the next one begins."""
        self._step = step
        elapsed_seconds = time.monotonic() - self._since
        if self._phase == STEP:
            self._longest_step_seconds = max(self._longest_step_seconds, elapsed_seconds)
        self._enter(STEP)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is not a step: it may take `other_seconds`."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def whereabouts(self) -> Whereabouts:
        return Whereabouts(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self._step,
            self._phase,
            round(time.monotonic() - self._since, 3),
            time.time(),
        )

    def _enter(self, phase: str) -> None:
        self._phase, self._since = phase, time.monotonic()

    @property
    def _allowed_seconds(self) -> float:
        if self._phase == STEP:
            return max(self.step_seconds, 3 * self._longest_step_seconds)
        return self.other_seconds

    def _watch(self) -> None:
        while not self._closed.wait(self.interval_seconds):
            status = self.whereabouts()
            written = self._write(status)
            if status.phase_seconds > self._allowed_seconds or (
                written and self._next_rank_is_silent()
            ):
                self._give_up(status)
                return

    def _next_rank_is_silent(self) -> bool:
        """Whether the next rank's file has not changed for `step_seconds` by this rank's clock.

        A missing file does not count: the rank has not begun, or has ended.
        """
        if self.world_size == 1:
            return False
        now = time.monotonic()
        next_rank = read_whereabouts(self._file((self.rank + 1) % self.world_size))
        if not next_rank or next_rank[0].written_at != self._next_written_at:
            self._next_seen_at = now
            self._next_written_at = next_rank[0].written_at if next_rank else 0.0
        return now - self._next_seen_at > self.step_seconds

    def _give_up(self, status: Whereabouts) -> None:
        stacks = self._write_stacks(status)
        print(
            f"rank {status.rank} ({status.host}, pid {status.pid}) waits for ever: in "
            f"{status.phase} after step {status.step} for {status.phase_seconds:.0f} s. Its stacks "
            f"are in {stacks}",
            file=sys.stderr,
            flush=True,
        )
        # The other ranks wait in the same collective and give up within an interval of this one:
        # time for them to write their stacks too, before the launcher ends them.
        self._closed.wait(3 * self.interval_seconds)
        if self._closed.is_set():
            return  # the phase has ended after all
        if self.rank == min(self._answering(status)):
            verdict = self._verdict(status)
            print(verdict, file=sys.stderr, flush=True)
            run_status.end(
                self.folder.parent, "failed", verdict, step=status.step, exit_code=EXIT_HUNG
            )
        self.end(EXIT_HUNG)

    def _answering(self, status: Whereabouts) -> list[int]:
        """Ranks that respond: their files were written recently. This rank is one of them."""
        recent_seconds = 5 * self.interval_seconds
        awake = [
            other.rank
            for other in self._others()
            if status.written_at - other.written_at < recent_seconds
        ]
        return [self.rank, *awake]

    def _verdict(self, status: Whereabouts) -> str:
        """Which ranks keep the others waiting, according to the files of all ranks."""
        awake = set(self._answering(status))
        others = {other.rank: other for other in self._others()}
        asleep = [others[rank] for rank in sorted(others.keys() - awake)]
        silent = sorted(set(range(self.world_size)) - awake - others.keys())
        reasons = [
            f"rank {other.rank} ({other.host}, pid {other.pid}) does not answer: stopped, swapped "
            f"out, or its machine is gone; last seen in {other.phase} after step {other.step}"
            for other in asleep
        ]
        reasons += [
            f"rank {rank} has written nothing: it ended, or its disk fails" for rank in silent
        ]
        behind = [other for other in others.values() if other.rank in awake]
        reasons += [
            f"rank {other.rank} ({other.host}, pid {other.pid}) is elsewhere: in {other.phase} "
            f"after step {other.step}, for {other.phase_seconds:.0f} s"
            for other in behind
            if (other.step, other.phase) != (status.step, status.phase)
        ]
        if not reasons:
            reasons = ["every rank answers and is in the same phase: the stacks tell which waits"]
        return "\n".join(["the run hangs:", *reasons, f"stacks of all ranks: {self.folder}"])

    def _others(self) -> list[Whereabouts]:
        others = []
        for rank in range(self.world_size):
            if rank != self.rank:
                others += read_whereabouts(self._file(rank))
        return others

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _write(self, status: Whereabouts) -> bool:
        """Write this rank's file; returns whether that was possible.

        No fsync: the file is only read while the machine is up.
        """
        path = self._file(self.rank)
        temporary = path.with_suffix(".tmp")
        with suppress(OSError):  # a full or read-only disk must not end a run that computes
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(status)) + "\n")
            temporary.replace(path)
            return True
        return False

    def _write_stacks(self, status: Whereabouts) -> Path | str:
        """Stacks of all threads of this rank; on stderr where the run folder cannot be written."""
        path = self.folder / f"rank_{self.rank:05d}.step_{status.step:08d}.stacks.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(asdict(status)) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            _write_flight_record(path.with_name(path.name.replace(".stacks.txt", ".nccl_trace")))
            return path
        except OSError as error:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return f"this log, because {path} could not be written ({error})"


def read_whereabouts(path: Path) -> list[Whereabouts]:
    """What a rank last wrote, or [] when there is nothing readable."""
    try:
        return [Whereabouts(**json.loads(path.read_text()))]
    except (OSError, ValueError, TypeError):
        return []


def _write_flight_record(path: Path) -> None:
    """NCCL's flight recorder: the last collectives of every group, for torch's fr_trace to read.

    Only where torch has NCCL and device.flight_recorder_entries is not 0 (flight_recorder.py).
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if not torch.cuda.is_available() or dump is None:
        return
    with suppress(RuntimeError):  # it is a help, and must not keep a run that hangs from ending
        path.write_bytes(dump())
