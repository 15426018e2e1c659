"""torchrun that passes requests to stop on to its workers, and their exit code back.

`torchrun` itself kills its workers 30 seconds after a signal, ends with 1 whatever they ended with, and prints a traceback
even when they stopped on request. Scripts must tell "stopped, run me again" (85) from a failure, so they start processes
through this:

    python launch/processes.py TORCHRUN_OPTIONS -m megatron_slm.train --config RECIPE.yaml

It takes torchrun's own options. SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the workers to stop, for as long as that takes; a
SIGINT after the first request kills them. With SLM_LAUNCHER_PID set to the process that started this one, its death is a
request too. Exit code: the first failing worker's (128 + n when it was killed by signal n), 0 when none failed.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

STOPPED = 85
SPOKEN = (2, 3, 4, STOPPED)
"""Exit codes of a program that has said why it ended: bad configuration, bad data, training failed, stopped."""
POLL_SECONDS = 0.5
REPEAT_SECONDS = 0.5
"""Signals closer together are one request."""
LEFT_TO_TORCHRUN = "--signals-to-handle=SIGQUIT"
"""It takes over the signals in this list, which cannot be empty."""
NO_LOG_FOLDER = f"--log-dir={os.devnull}"
"""Without one given, torchrun leaves a folder torchelastic_* in the temporary folder at every start."""


class StopRequests:
    """Hears requests to stop and tells them to the workers, those that start later included."""

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
                # Again and again: one that is just being started does not hear the first time.
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
    """Keep torchrun from reporting workers that stopped, or said themselves what is wrong; other failures stay."""
    spoken = tuple(f"exitcode: {code})" for code in SPOKEN)
    logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger(logger).addFilter(
        lambda record: (
            not requests.asked.is_set()
            and not any(words in record.getMessage() for words in spoken)
        )
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    requests = StopRequests()
    requests.listen()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    quieten("torch.distributed.elastic.multiprocessing.api", requests)
    try:
        if not requests.asked.is_set():
            log_folder = [] if "PET_LOG_DIR" in os.environ else [NO_LOG_FOLDER]
            run(parse_args([LEFT_TO_TORCHRUN, *log_folder, *argv]))  # one in argv counts
            return 0
        code = STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if requests.asked.is_set() and failure.exitcode == -signal.SIGTERM:
            code = STOPPED  # asked before it could listen, so before it had done anything
    except SignalException as error:
        return 128 + int(error.sigval)
    if code == STOPPED:
        say("stopped on request; start the same command again to continue")
    else:
        say(f"process {rank} failed first, with exit code {code}; its message is above")
    return code


def say(sentence: str) -> None:
    """To stderr, unbuffered; a closed terminal or pipe must not change the exit code."""
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
