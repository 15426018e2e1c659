"""Clocks and memory meters shared by the benchmarks."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h

GATE_SLACK = 1.03
"""A gate is missed where a ratio is beyond it by this factor."""

WARM_UP_CALLS = {"cpu": 1, "wall": 1, "cuda": 4}
"""On CUDA the first call compiles kernels and the second still fills the allocator's cache; from
the third on it does what training does."""


class Unavailable(Exception):
    """What a case needs is not installed, or this device has it not: the case is not run."""


def seconds_per_call(
    sides: dict[str, Callable[[], object]], clock: str, rounds: int
) -> dict[str, list[float]]:
    """Time every side once per round, in turn, after some untimed calls each.

    clock: cpu, wall or cuda.
    """
    for side in sides.values():
        for _ in range(WARM_UP_CALLS[clock]):
            side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in in_turn(sides, rounds):
        times[name].append(_one_call(side, clock))
    return times


def median_cpu_seconds(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a short call of each side; the sides take turns, without a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in in_turn(sides, rounds):
        start = time.process_time()
        side()
        taken[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def in_turn(
    sides: dict[str, Callable[[], object]], rounds: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every side once per round: what else happens on the machine happens to all of them."""
    for _ in range(rounds):
        yield from sides.items()


def _one_call(side: Callable[[], object], clock: str) -> float:
    gc.collect()
    if clock == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    now = time.process_time if clock == "cpu" else time.perf_counter
    began = now()
    side()
    return now() - began


def release_memory(device: torch.device) -> None:
    """Free what nothing refers to any longer, and give it back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def peak_extra_bytes(side: Callable[[], object], device: torch.device) -> int:
    """Highest memory use during the call, above what was in use before it.

    The side is called once before: workspaces that stay (cuBLAS's 32 MiB) count on no side.
    """
    gc.collect()
    if device.type == "cuda":
        side()
        release_memory(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL("libc.so.6")
    # A freed tensor leaves at once: glibc would keep it, and count it into a later peak.
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    side()  # memory mapped under the old rule is replaced, and first-call buffers are made
    libc.malloc_trim(0)  # freed heap that stayed resident would hide that much of the call's use
    # Sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    side()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory cases need Linux.")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
