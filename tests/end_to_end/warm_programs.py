"""The project's programs, run as `python -m` runs them, but in processes that are forked from a
server which has imported torch and megatron-core: most of a small run's time is that import.

What an import changes, torchrun and kills need real starts (small_run.py, small_pipeline.py).
"""

import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection
from pathlib import Path

from megatron_slm.testing.spawn import warm_context

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 600


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(ROOT),
    }


def run_program(
    module: str,
    *arguments,
    processes: int = 1,
    exit_code: int | None = 0,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGUMENTS`; with several processes each is told its rank as torchrun would.

    The output of all is in stdout and stderr. It must end with `exit_code`, unless that is None; -9
    is a process that was killed, other than by this function after another had failed.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="slm_program_") as folder:
        ranks = []
        for of_rank in _variables(processes):
            arguments = (module, words, {**of_rank, **(variables or {})}, Path(folder))
            ranks.append(warm_context().Process(target=_main, args=arguments))
            ranks[-1].start()
        codes = _end_together(ranks)
        stdout, stderr = (_said(Path(folder), name) for name in ("stdout", "stderr"))
    done = subprocess.CompletedProcess([module, *words], max(codes, key=abs), stdout, stderr)
    assert exit_code in (None, done.returncode), (
        f"{module} ended with {codes}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def _said(folder: Path, name: str) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob(f"{name}_*")))


def _end_together(ranks: list) -> list[int]:
    """Wait; like torchrun, end the others when one has failed. The exit codes of those that ended
    by themselves.
    """
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting and all(rank.exitcode in (None, 0) for rank in ranks):
        ended = connection.wait(waiting, PATIENCE_SECONDS)
        if not ended:
            break
        for sentinel in ended:
            waiting.pop(sentinel).join()
    for rank in waiting.values():
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks if rank not in waiting.values()]


def _variables(processes: int) -> list[dict[str, str]]:
    """The environment of each rank."""
    if processes == 1:
        return [environment()]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [{**environment(), **job, **rank} for rank in ranks]


def _main(module: str, words: list[str], variables: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # what the server knew of TMPDIR
    os.chdir(ROOT)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with open(folder / f"{name}_{variables.get('RANK', 0)}", "wb") as output:
            os.dup2(output.fileno(), descriptor)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
