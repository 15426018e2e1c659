"""Detects that this process should stop: signals, a second Ctrl-C, and the death of its torchrun.

Used by training and by scoring, from their first line on, so it imports no torch.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Each requests a stop. A signal that was ignored when the process started (nohup, a background
job) stays ignored.
"""
STOP_FILE = "stop_requested"
"""Creating this file in the run folder requests a stop, as a signal does."""
STDERR = 2
LAUNCHER_POLL_SECONDS = 1.0
REPEAT_SECONDS = 0.5
"""Signals closer together are one request: `timeout` and some shells send each twice."""


class StopSignals:
    """A context manager within which the first stop signal is a request.

    A SIGINT after that ends the process at once.

    sentence: written to stderr by the job's first process on Ctrl-C or when its launcher is gone,
    but not on other signals, whose senders report them. on_request: called by the first signal,
    between two instructions of the main thread; it may raise. `asked` is the name of the first
    signal ("" = none yet).

    A process of torchrun whose parent is gone sends itself SIGTERM: no process is left to pass on a
    request to stop, to notice that another process failed, or to free the machine. A thread watches
    for that. PR_SET_PDEATHSIG would fire when the parent's starting *thread* ends, and only reaches
    handlers that are installed by then.
    """

    def __init__(self, sentence: str, on_request: Callable[[], None] | None = None):
        self.sentence = sentence
        self.on_request = on_request
        self.asked = ""
        self._asked_at = 0.0
        self._process = os.getpid()  # a forked writer of checkpoints inherits the handlers
        self._handlers_before: dict[int, Any] = {}
        self._closed = threading.Event()

    def __enter__(self) -> "StopSignals":
        # kill -USR2 PID prints the stacks of all threads of a hung process.
        faulthandler.register(signal.SIGUSR2, file=STDERR, all_threads=True)
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers_before[number] = signal.signal(number, self._on_signal)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # Without torchrun the parent is a shell or slurmstepd: it may end before a run under
            # nohup, and SLURM ends the processes of a job itself.
            threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for stream in (sys.stdout, sys.stderr):
            _forget_if_closed(stream)
        if self.asked:
            # torchrun signals the others when the first has ended, and they must not die of it
            # while the interpreter ends, which puts every handler but "ignore" back.
            for number in set(self._handlers_before) - {signal.SIGINT}:
                signal.signal(number, signal.SIG_IGN)
            return
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        again = self.asked and time.monotonic() - self._asked_at > REPEAT_SECONDS
        if again and number == signal.SIGINT:
            # Dies by the signal, so that a shell loop around the program ends as well.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if self.asked:
            return
        self.asked = signal.Signals(number).name
        self._asked_at = time.monotonic()
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT:
            self._say(self.sentence + "; Ctrl-C again ends it at once")
        if self.on_request is not None:
            self.on_request()

    def _watch(self, launcher: int) -> None:
        while not self._closed.wait(LAUNCHER_POLL_SECONDS):
            if os.getppid() != launcher:
                self._say("the torchrun that started this process is gone: " + self.sentence)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _say(self, sentence: str) -> None:
        """Write past Python's buffers: a handler may interrupt a write to them.

        A closed terminal is no reason to fail.
        """
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(STDERR, f"\n{sentence}\n".encode())


def _forget_if_closed(stream: TextIO) -> None:
    """Send `stream` to /dev/null where the terminal or the pipe behind it is gone.

    Otherwise what is left in its buffer would turn the exit code into 120.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
