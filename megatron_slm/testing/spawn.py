"""Run a function on CPU processes with real megatron-core groups, for tests and examples."""

import math
import multiprocessing as python_multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from megatron_slm.config.schema import ParallelConfig


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
    return run_layouts_on_cpu(function, {"only": layout}, *args, seed=seed)["only"]


def run_layouts_on_cpu(
    function: Callable[..., Any],
    layouts: dict[str, dict[str, Any]],
    *args: Any,
    seed: int = 1234,
) -> dict[str, list[Any]]:
    """`run_on_cpu` for several layouts in one set of processes; results by the layouts' names.

    A layout is a dict with tp, pp, vpp, cp, dp, ep (default 1), etp (0 = tp) and sequence_parallel.
    One that needs fewer processes leaves the others idle. Processes are forked from a server that
    has imported megatron-core (about 5 s, once per program that calls this), so they have the
    environment variables of the first call.
    """
    warm_context()
    worlds = {name: world_size(layout) for name, layout in layouts.items()}
    with tempfile.TemporaryDirectory(prefix="slm_spawn_") as folder:
        multiprocessing.start_processes(
            _worker,
            (folder, layouts, worlds, seed, function, args),
            nprocs=max(worlds.values()),
            start_method="forkserver",
        )
        return {name: _results(Path(folder), name, world) for name, world in worlds.items()}


def _results(folder: Path, layout: str, world: int) -> list[Any]:
    return [torch.load(folder / f"{layout}_{rank}.pt", weights_only=False) for rank in range(world)]


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


def _worker(
    rank: int,
    folder: str,
    layouts: dict[str, dict[str, Any]],
    worlds: dict[str, int],
    seed: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    from megatron_slm.device import choose_device
    from megatron_slm.parallel import join_job, leave_job

    torch.set_num_threads(1)
    for number, (name, layout) in enumerate(layouts.items()):
        if rank >= worlds[name]:
            continue
        parallel = ParallelConfig(
            tensor=layout.get("tp", 1),
            pipeline=layout.get("pp", 1),
            virtual_pipeline=layout.get("vpp", 1),
            context=layout.get("cp", 1),
            expert=layout.get("ep", 1),
            expert_tensor=layout.get("etp", 0),
            sequence=layout.get("sequence_parallel", False),
        )
        _wait_for_members(Path(folder), number, rank, worlds[name])
        store = torch.distributed.FileStore(str(Path(folder, f"store_{number}")), worlds[name])
        groups = join_job(
            parallel,
            choose_device("cpu"),
            seed,
            timeout_minutes=5,
            store=store,
            rank=rank,
            world_size=worlds[name],
        )
        try:
            torch.save(function(groups, *args), Path(folder, f"{name}_{rank}.pt"))
        except Exception:
            traceback.print_exc()
            raise
        finally:
            leave_job()


def _wait_for_members(folder: Path, number: int, rank: int, world: int) -> None:
    """Return when all processes of a layout are free to join it.

    Earlier, smaller layouts may take longer than a collective is allowed to. There is no time limit
    here: when a process fails, the program that started them ends the others.
    """
    (folder / f"free_{number}_{rank}").touch()
    while not all((folder / f"free_{number}_{member}").exists() for member in range(world)):
        time.sleep(0.02)
