"""Make the stages that are missing, each as one process; what is made is never made again.

FOLDER/KEY/            what a stage writes
FOLDER/done/KEY.json   written once its program has ended with 0: what it cost and was made from
FOLDER/logs/KEY.txt    what its program printed
"""

import json
import os
import queue
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.claims import corpora
from benchmarks.claims.commands import command_of, text_folder
from benchmarks.claims.graph import Stage, folder_of, in_order
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.files.folder_lock import FolderLock

STOP_SECONDS = 60
ROOT = Path(__file__).resolve().parents[2]
ROLES = {"megatron_slm.train": "train", "megatron_slm.score": "score"}
"""Programs that have batch scripts of their own."""
Launch = Callable[[list[str], Path], float]
"""Runs a module with arguments, its output into a file; returns the CPU seconds that it took.
StageFailed when it ends with another code than 0."""


class StageFailed(RuntimeError):
    """A program that ended with another exit code than 0."""


class _Stoppable:
    """Knows the processes that it has started and that have not ended."""

    def __init__(self) -> None:
        self._running: set[Any] = set()

    def stop(self) -> None:
        """Ask the programs that run to stop, and wait: a run of training saves where it is."""
        for process in list(self._running):
            process.terminate()
        until = time.monotonic() + STOP_SECONDS
        while self._running and time.monotonic() < until:
            time.sleep(0.1)


class CommandLauncher(_Stoppable):
    """Starts programs with `python -m`, or with the words of a scale's `launch` before their
    arguments.
    """

    def __init__(self, prefixes: Mapping[str, Sequence[str]]):
        super().__init__()
        self._prefixes = prefixes

    def __call__(self, command: list[str], log: Path) -> float:
        words = self.words(command)
        with log.open("ab") as output:
            process = subprocess.Popen(
                words, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT
            )
        self._running.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self._running.discard(process)
        check_exit(words, process.returncode, log)
        return usage.ru_utime + usage.ru_stime

    def words(self, command: list[str]) -> list[str]:
        """What is executed for a module and its arguments."""
        module, *arguments = command
        if ROLES.get(module) in self._prefixes:
            return [*self._prefixes[ROLES[module]], *arguments]
        if "program" in self._prefixes:
            return [*self._prefixes["program"], module, *arguments]
        return [sys.executable, "-m", module, *arguments]


class ForkLauncher(_Stoppable):
    """Forks the programs' processes from a server that has imported torch and megatron-core.

    That import takes some ten CPU seconds, a third of a run of the scale `cpu`. The programs are
    the same, each in a process of its own. For CPUs only.
    """

    def __init__(self) -> None:
        super().__init__()
        os.environ.update(_environment())  # the server is started with it

    def __call__(self, command: list[str], log: Path) -> float:
        from megatron_slm.testing.spawn import warm_context

        module, *arguments = command
        receiver, sender = warm_context().Pipe(duplex=False)
        log.touch()  # a process that is killed at once leaves none
        process = warm_context().Process(target=run_module, args=(module, arguments, log, sender))
        process.start()
        sender.close()
        self._running.add(process)
        try:
            cpu_seconds = float(receiver.recv())
        except EOFError:  # killed
            cpu_seconds = 0.0
        process.join()
        self._running.discard(process)
        check_exit(command, process.exitcode or 0, log)
        return cpu_seconds


def run_module(module: str, arguments: list[str], log: Path, sender: Connection) -> None:
    """`python -m MODULE ARGUMENTS` in a forked process, which sends the CPU seconds it took."""
    os.chdir(ROOT)
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        spent = time.process_time() + os.times().children_user + os.times().children_system
        sender.send(spent)


def check_exit(words: Sequence[str], code: int, log: Path) -> None:
    """StageFailed with the end of the log, unless the program ended with 0."""
    if code:
        tail = log.read_text(errors="replace")[-1500:]
        raise StageFailed(f"{' '.join(words)}\nended with {code}; {log} ends:\n{tail}")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **own}


def marker(stage: Stage, folder: Path) -> Path:
    """The file that says that a stage is done."""
    return folder / "done" / f"{stage.key}.json"


def is_done(stage: Stage, folder: Path) -> bool:
    return marker(stage, folder).is_file()


def make(stage: Stage, folder: Path, launch: Launch, workers: int = 1) -> None:
    """Make one stage whose needs are done, unless it is done.

    workers: processes of preprocessing; the corpus is the same for any number.
    """
    if is_done(stage, folder):
        return
    started = time.monotonic()
    cpu_seconds = time.process_time()
    if stage.kind in ("text", "noise"):
        _write_text(stage, folder)
        cpu_seconds = time.process_time() - cpu_seconds
    else:
        log = folder / "logs" / f"{stage.key}.txt"
        cpu_seconds = launch(command_of(stage, folder, workers), log)
    note = {
        "kind": stage.kind,
        "name": stage.name,
        "identity": stage.identity,
        "needs": [needed.key for needed in stage.needs],
        "cpu_seconds": round(cpu_seconds, 2),
        "wall_seconds": round(time.monotonic() - started, 2),
    }
    write_json_atomically(marker(stage, folder), note)


def _write_text(stage: Stage, folder: Path) -> None:
    own = folder_of(stage, folder)
    if stage.kind == "noise":
        clean = text_folder(stage.needs[0], folder) / "corpus.jsonl"
        corpora.write_noise(own, stage.name, stage.identity["share"], clean)
    elif not stage.identity.get("folder"):
        corpora.write_corpora(own, stage.identity["pair"], stage.identity["characters"])


def make_all(
    stages: list[Stage],
    folder: Path,
    launch: Launch,
    jobs: int,
    say: Callable[[str], None],
    workers: int = 1,
) -> None:
    """Make stages and what they need, `jobs` at a time, in the order given where there is a choice.

    After a failure nothing new is begun; StageFailed of the first is raised when the others end.
    """
    for name in ("done", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, "a run of experiments", "Let it end, or give another --folder"):
        waiting = [stage for stage in in_order(stages) if not is_done(stage, folder)]
        _work(waiting, folder, lambda stage: make(stage, folder, launch, workers), jobs, say)


def _work(
    waiting: list[Stage],
    folder: Path,
    make_one: Callable[[Stage], None],
    jobs: int,
    say: Callable[[str], None],
) -> None:
    ended: queue.Queue[tuple[Stage, BaseException | None]] = queue.Queue()
    running: dict[str, threading.Thread] = {}
    failure: BaseException | None = None
    total, done = len(waiting), 0

    def work(stage: Stage) -> None:
        try:
            make_one(stage)
        except BaseException as error:
            ended.put((stage, error))
        else:
            ended.put((stage, None))

    while running or (waiting and failure is None):
        for stage in [stage for stage in waiting if _is_ready(stage, folder)]:
            if len(running) == jobs or failure is not None:
                break
            waiting.remove(stage)
            running[stage.key] = threading.Thread(target=work, args=(stage,), daemon=True)
            running[stage.key].start()
        stage, error = ended.get()
        running.pop(stage.key).join()
        failure = failure or error
        done += error is None
        say(f"{done}/{total} {stage.key}{'' if error is None else ' failed'}")
    if failure is not None:
        raise failure


def _is_ready(stage: Stage, folder: Path) -> bool:
    return all(is_done(needed, folder) for needed in stage.needs)


def read_note(stage: Stage, folder: Path) -> dict[str, Any]:
    """What was noted when a stage was done."""
    return dict(json.loads(marker(stage, folder).read_text()))
