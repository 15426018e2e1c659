"""torchrun that passes requests to stop on to its workers, and their exit code back.

`torchrun` itself kills its workers 30 seconds after a signal, ends with 1 whatever they ended with,
and prints a traceback even when they stopped on request. Scripts must tell "stopped, run me again"
(85) from a failure, so they start processes through this:

    python launch/processes.py TORCHRUN_OPTIONS -m megatron_slm.train --config RECIPE.yaml

It takes torchrun's own options. Where SLURM starts every process itself (`srun` with one task per
process), each task runs

    python launch/processes.py --slurm-task -m megatron_slm.train --config RECIPE.yaml

which is one process of the job, with SLURM's task number as its rank.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the workers to stop, for as long as that takes; a SIGINT
after the first request kills them. With SLM_LAUNCHER_PID set to the process that started this one,
its death is a request too. Exit code: the first failing worker's (128 + n when it was killed by
signal n), 0 when none failed.

How the processes ended also stands in a line on standard error, "processes.py: exit code N: ...",
which launch/slurm.sh reads: srun makes one number of the exit codes of all nodes, and ends the
other nodes when one of them fails. With SLM_STOPPED_IS_SUCCESS set, 85 appears in that line only
and the exit code is 0, so that every node can stop in its own time.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

STOPPED = 85
SPOKEN = (2, 3, 4, 86, STOPPED)
"""Exit codes of a program that has reported why it ended: bad configuration or data, training
failed, hung, stopped."""
POLL_SECONDS = 0.5
REPEAT_SECONDS = 0.5
"""Signals closer together are one request."""
LEFT_TO_TORCHRUN = "--signals-to-handle=SIGQUIT"
"""It takes over the signals in this list, which cannot be empty."""
NO_LOG_FOLDER = f"--log-dir={os.devnull}"
"""Without one given, torchrun leaves a folder torchelastic_* in the temporary folder at every
start."""


class StopRequests:
    """Receives requests to stop and passes them on to the workers, also to those that start
    later.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._asked_at = 0.0
        self._launcher = os.environ.get("SLM_LAUNCHER_PID", "")

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup is respected
            signal.signal(signal.SIGHUP, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, number: int, frame: object) -> None:
        again = self.asked.is_set() and time.monotonic() - self._asked_at > REPEAT_SECONDS
        if again and number == signal.SIGINT:
            for worker in workers():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker, signal.SIGKILL)  # torchrun gives each worker its group
            os._exit(128 + signal.SIGINT)
        if not self.asked.is_set():
            self._asked_at = time.monotonic()
        self.asked.set()

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            if self._launcher and str(os.getppid()) != self._launcher:
                self.asked.set()
            if self.asked.is_set():
                # Repeatedly, because a worker that is just starting may miss the first signal.
                for worker in workers():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGTERM)


def workers() -> list[int]:
    """The living children of this process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # "pid (name) state parent ...", and a name may hold spaces and brackets
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # it ended in the meantime
                continue
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(entry.name))
    return found


def quieten(logger: str, requests: StopRequests) -> None:
    """Keep torchrun from reporting workers that stopped, or reported their failure themselves;
    other failures stay.
    """
    spoken = tuple(f"exitcode: {code})" for code in SPOKEN)
    logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger(logger).addFilter(
        lambda record: (
            not requests.asked.is_set()
            and not any(words in record.getMessage() for words in spoken)
        )
    )


def run_torchrun(argv: list[str], requests: StopRequests) -> tuple[int, str]:
    """Start this node's processes through torchrun and wait; the exit code, and whose it is."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    quieten("torch.distributed.elastic.multiprocessing.api", requests)
    try:
        if not requests.asked.is_set():
            log_folder = [] if "PET_LOG_DIR" in os.environ else [NO_LOG_FOLDER]
            run(parse_args([LEFT_TO_TORCHRUN, *log_folder, *argv]))  # one in argv counts
            return 0, ""
        return STOPPED, ""
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return exit_code(failure.exitcode, requests), f"process {rank}"
    except SignalException as error:
        return 128 + int(error.sigval), "torchrun"
    except Exception:  # for example, the processes could not connect
        traceback.print_exc()
        return 1, "torchrun"


def run_slurm_task(argv: list[str], requests: StopRequests) -> tuple[int, str]:
    """Run `-m MODULE ARGUMENTS` or a file as the rank that SLURM gave this task.

    Returns its exit code, and which process it was.
    """
    try:
        rank = os.environ["SLURM_PROCID"]
        environment = {
            "RANK": rank,
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": os.environ["SLURM_NTASKS"],
            "LOCAL_WORLD_SIZE": os.environ["SLM_PROCESSES_PER_NODE"],
            "MASTER_ADDR": os.environ["SLM_MASTER_ADDRESS"],
            "MASTER_PORT": os.environ["SLM_MASTER_PORT"],
        }
    except KeyError as missing:
        print(f"--slurm-task: {missing.args[0]} is not set; see launch/slurm.sh", file=sys.stderr)
        return 2, "this task"
    if requests.asked.is_set():
        return STOPPED, ""
    # A session, and so a process group, of its own, as torchrun gives: a second Ctrl-C kills the
    # group.
    process = subprocess.Popen(
        [sys.executable, *argv], env=os.environ | environment, start_new_session=True
    )
    return exit_code(process.wait(), requests), f"process {rank}"


def exit_code(status: int, requests: StopRequests) -> int:
    """A worker's exit code as a shell shows it; `status` is negative when a signal killed it."""
    if requests.asked.is_set() and status == -signal.SIGTERM:
        return STOPPED  # stopped before it installed its handler, so before it had done anything
    return status if status >= 0 else 128 - status


def say_how_it_ended(code: int, process: str) -> None:
    if code == STOPPED:
        ending = "stopped on request; start the same command again to continue"
    else:
        node = os.environ.get("SLURMD_NODENAME")
        where = f" on {node}" if node else ""
        ending = f"{process}{where} failed first; its message is above"
    say(f"processes.py: exit code {code}: {ending}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    requests = StopRequests()
    requests.listen()
    if argv[0] == "--slurm-task":
        code, process = run_slurm_task(argv[1:], requests)
    else:
        code, process = run_torchrun(argv, requests)
    if code:
        say_how_it_ended(code, process)
    return 0 if code == STOPPED and os.environ.get("SLM_STOPPED_IS_SUCCESS") else code


def say(sentence: str) -> None:
    """To stderr, unbuffered; a closed terminal or pipe must not change the exit code."""
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
