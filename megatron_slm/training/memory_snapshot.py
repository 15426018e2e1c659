"""What filled the memory of a GPU: the history of its allocations, written when memory runs out.

Not yet run on a GPU.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

MAX_ENTRIES = 100_000
"""Allocations that are remembered; each takes some hundred bytes of host memory."""


class MemorySnapshot:
    """A context manager that writes a snapshot when its block ends with CUDA out of memory.

    The file is RUN/memory_snapshot.pickle, or RUN/memory_snapshot.rank_NNNNN.pickle where the job
    has several processes, for https://pytorch.org/memory_viz. On a CPU nothing is recorded, and a
    warning says so.
    """

    def __init__(
        self,
        wanted: bool,
        device: torch.device,
        run_folder: Path,
        *,
        rank: int,
        world_size: int,
        report: Callable[[str, str], None],
    ):
        self.recording = wanted and device.type == "cuda"
        self.unheeded = wanted and not self.recording
        self.report = report
        name = "memory_snapshot" if world_size == 1 else f"memory_snapshot.rank_{rank:05d}"
        self.path = run_folder / f"{name}.pickle"

    def __enter__(self) -> "MemorySnapshot":
        if self.unheeded:
            self.report(
                "monitoring.memory_snapshot records nothing: only CUDA's allocator tells what it "
                "does, and the device is the CPU",
                "warning",
            )
        if self.recording:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self.recording:
            return
        if error_type is not None and issubclass(error_type, torch.OutOfMemoryError):
            try:
                torch.cuda.memory._dump_snapshot(str(self.path))
                outcome = f"out of memory; what filled it is in {self.path}"
            except OSError as error:
                outcome = f"out of memory, and {self.path} could not be written ({error})"
            print(f"train: {outcome}", file=sys.stderr, flush=True)
        torch.cuda.memory._record_memory_history(enabled=None)
