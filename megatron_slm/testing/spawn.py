"""Run a function on CPU processes with real megatron-core groups, for tests and examples."""

import math
import multiprocessing as python_multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as multiprocessing

from megatron_slm.config.schema import ParallelConfig

if TYPE_CHECKING:
    from megatron_slm.device import Device


def run_on_cpu(
    function: Callable[..., Any],
    *args: Any,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    cp: int = 1,
    dp: int = 1,
    ep: int = 1,
    etp: int = 0,
    sequence_parallel: bool = False,
    seed: int = 1234,
) -> list[Any]:
    """Call `function(groups, *args)` in tp*pp*cp*dp processes; return the results in rank order.

    Expert parallelism, `ep`, takes no processes of its own. `function` is a top-level function of
    an importable file, its result picklable. A failure in any rank is raised here with that rank's
    traceback. Processes meet through a file, so tests need no ports and can run side by side.
    """
    layout = dict(
        tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, ep=ep, etp=etp, sequence_parallel=sequence_parallel
    )
    places = [_Place("only", layout, range(world_size(layout)))]
    return _run(_without_name, places, seed, (function, *args), _Cpu())["only"]


def run_layouts_on_cpu(
    function: Callable[..., Any],
    layouts: dict[str, dict[str, Any]],
    *args: Any,
    seed: int = 1234,
    side_by_side: bool = False,
    backend: str = "gloo",
) -> dict[str, list[Any]]:
    """Call `function(groups, name, *args)` in several layouts, in one set of processes; return the
    results by the layouts' names.

    A layout is a dict with tp, pp, vpp, cp, dp, ep (default 1), etp (0 = tp) and sequence_parallel.
    Layouts run one after the other, in the order given, and one that needs fewer processes leaves
    the others idle. `side_by_side` spreads them over all processes instead, largest first: the
    waiting of one layout is then the work of another, and no layout may need what another left.
    Processes are forked from a server that has imported megatron-core (about 4 s, once per program
    that calls this), so they have the environment variables of the first call. backend: that of
    torch.distributed; beside gloo, shared_gpu.STAGED_GLOO works on a CPU.
    """
    return _run(function, _placed(layouts, side_by_side), seed, args, _Cpu(backend))


def run_layouts_on_shared_gpu(
    function: Callable[..., Any], layouts: dict[str, dict[str, Any]], *args: Any, seed: int = 1234
) -> dict[str, list[Any]]:
    """`run_layouts_on_cpu` on GPUs with more processes than there are, as shared_gpu.py allows.

    Processes are started afresh. Their results come back in the CPU's memory.
    """
    return _run(function, _placed(layouts, False), seed, args, _SharedGpu())


@dataclass(frozen=True)
class _Cpu:
    """Processes on the CPU, and the backend they talk over."""

    backend: str = "gloo"
    start_method: str = "forkserver"

    def take(self, process: int, processes: int) -> "Device":
        from megatron_slm.device import choose_device
        from megatron_slm.shared_gpu import STAGED_GLOO, register_staged_gloo

        if self.backend == STAGED_GLOO:
            register_staged_gloo()
        return replace(choose_device("cpu"), backend=self.backend)


@dataclass(frozen=True)
class _SharedGpu:
    """Processes on GPUs that others have too; the server that forks others is on the CPU."""

    start_method: str = "spawn"

    def take(self, process: int, processes: int) -> "Device":
        from megatron_slm.device import choose_device
        from megatron_slm.shared_gpu import SWITCH

        local = {"LOCAL_RANK": process, "LOCAL_WORLD_SIZE": processes, "WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in local.items()} | {SWITCH: "1"})
        return choose_device("cuda")


@dataclass(frozen=True)
class _Place:
    """A layout, and the processes that are its ranks."""

    name: str
    layout: dict[str, Any]
    processes: range


def _placed(layouts: dict[str, dict[str, Any]], side_by_side: bool) -> list[_Place]:
    """In the order in which every process takes its part, so that no two wait for each other."""
    worlds = {name: world_size(layout) for name, layout in layouts.items()}
    if not side_by_side:
        return [_Place(name, layout, range(worlds[name])) for name, layout in layouts.items()]
    waiting = [0] * max(worlds.values())  # layouts that each process has before it
    places = []
    for name in sorted(layouts, key=worlds.__getitem__, reverse=True):
        starts = range(0, len(waiting) - worlds[name] + 1)
        first = min(starts, key=lambda start: max(waiting[start : start + worlds[name]]))
        places.append(_Place(name, layouts[name], range(first, first + worlds[name])))
        depth = max(waiting[process] for process in places[-1].processes) + 1
        for process in places[-1].processes:
            waiting[process] = depth
    return places


def _without_name(groups, name: str, function: Callable[..., Any], *args: Any) -> Any:
    return function(groups, *args)


def _run(
    function: Callable[..., Any],
    places: list[_Place],
    seed: int,
    args: tuple[Any, ...],
    devices: _Cpu | _SharedGpu,
) -> dict[str, list[Any]]:
    processes = max(place.processes.stop for place in places)
    with tempfile.TemporaryDirectory(prefix="slm_spawn_") as folder:
        run_processes(
            _worker,
            (folder, places, seed, function, args, devices, processes),
            processes,
            devices.start_method,
        )
        results = {
            place.name: _results(Path(folder), place.name, len(place.processes)) for place in places
        }
    return results


def run_processes(
    function: Callable[..., None],
    args: tuple[Any, ...],
    processes: int,
    start_method: str = "forkserver",
) -> None:
    """torch.multiprocessing.spawn(function, args, processes), but "forkserver" takes the server of
    `warm_context`, so that the processes have megatron-core and the CPU stand-ins.
    """
    if start_method == "forkserver":
        warm_context()
    multiprocessing.start_processes(function, args, nprocs=processes, start_method=start_method)


def _results(folder: Path, layout: str, world: int) -> list[Any]:
    return [
        torch.load(folder / f"{layout}_{rank}.pt", map_location="cpu", weights_only=False)
        for rank in range(world)
    ]


def warm_context() -> ForkServerContext:
    """The multiprocessing context whose processes are forked from a server that has imported
    megatron-core, and pytest where this is a test.

    The server starts with the first process and lives as long as this one.
    """
    context = python_multiprocessing.get_context("forkserver")
    of_test_files = [name for name in ("pytest", "hypothesis") if name in sys.modules]
    context.set_forkserver_preload(["megatron_slm.testing.cpu_process", *of_test_files])
    return context


def world_size(layout: dict[str, Any]) -> int:
    """The processes that a layout takes; expert parallelism takes none of its own."""
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def parallel_config(layout: dict[str, Any]) -> ParallelConfig:
    """The sizes of a layout as settings; its data-parallel size follows from the processes."""
    return ParallelConfig(
        tensor=layout.get("tp", 1),
        pipeline=layout.get("pp", 1),
        virtual_pipeline=layout.get("vpp", 1),
        context=layout.get("cp", 1),
        expert=layout.get("ep", 1),
        expert_tensor=layout.get("etp", 0),
        sequence=layout.get("sequence_parallel", False),
    )


def _worker(
    process: int,
    folder: str,
    places: list[_Place],
    seed: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    devices: _Cpu | _SharedGpu,
    processes: int,
) -> None:
    torch.set_num_threads(1)
    device = devices.take(process, processes)  # before anything imports megatron.core
    for place in places:
        if process in place.processes:
            rank = place.processes.index(process)
            _take_part(place, rank, Path(folder), seed, function, args, device)


def _take_part(
    place: _Place,
    rank: int,
    folder: Path,
    seed: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: "Device",
) -> None:
    """One rank of a layout: join its job, call the function, keep the result in a file."""
    from megatron_slm.parallel import join_job, leave_job

    world = len(place.processes)
    _wait_for_members(folder, place.name, rank, world)
    groups = join_job(
        parallel_config(place.layout),
        device,
        seed,
        timeout_minutes=5,
        store=torch.distributed.FileStore(str(folder / f"store_{place.name}"), world),
        rank=rank,
        world_size=world,
    )
    try:
        torch.save(function(groups, place.name, *args), folder / f"{place.name}_{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        leave_job()


def _wait_for_members(folder: Path, layout: str, rank: int, world: int) -> None:
    """Return when all processes of a layout are free to join it.

    Earlier layouts may take longer than a collective is allowed to. There is no time limit here:
    when a process fails, the program that started them ends the others.
    """
    (folder / f"free_{layout}_{rank}").touch()
    while not all((folder / f"free_{layout}_{member}").exists() for member in range(world)):
        time.sleep(0.02)
