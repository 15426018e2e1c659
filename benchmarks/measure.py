"""Clocks and memory meters shared by the benchmarks."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def seconds_per_call(
    sides: dict[str, Callable[[], object]], clock: str, rounds: int
) -> dict[str, list[float]]:
    """Time every side once per round, in turn, after one untimed call each (20 on CUDA). clock: cpu, wall or cuda."""
    for side in sides.values():
        for _ in range(20 if clock == "cuda" else 1):
            side()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(_one_call(side, clock))
    return times


def _one_call(side: Callable[[], object], clock: str) -> float:
    gc.collect()
    if clock == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        side()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    side()
    return now() - start


def peak_extra_bytes(side: Callable[[], object], device: torch.device) -> int:
    """Highest memory use during the call, above what was in use before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(
        _M_MMAP_THRESHOLD, 1 << 17
    )  # a freed tensor leaves at once: glibc would keep it, and count it into a later peak
    side()  # memory mapped under the old rule is replaced, and first-call buffers are made
    libc.malloc_trim(0)  # freed heap that stayed resident would hide that much of the call's use
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # sets the high-water mark back to what is resident now
    before = _status_bytes("VmRSS")
    side()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory cases need Linux.")
