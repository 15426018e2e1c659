"""The stages of a pipeline one after the other on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_slm.pipeline.checks import Assembled
from megatron_slm.pipeline.stages import PROGRAM, PYTHON, Stage
from megatron_slm.pipeline.state import State
from megatron_slm.training.stop_signals import STOP_SIGNALS

STOPPED = 85


class LocalRun:
    """Runs what is missing.

    `run` returns the exit code: 0, the first failing stage's, or 85 when it was stopped on request.
    """

    def __init__(self, pipeline: Assembled, state: State, checkout: Path):
        self._pipeline = pipeline
        self._state = state
        self._checkout = checkout
        self._child: subprocess.Popen | None = None
        self._asked = False
        self._python = os.environ.get("SLM_PYTHON") or sys.executable

    def run(self) -> int:
        """Run every stage that is not finished, each after those it needs."""
        begun = time.monotonic()
        with self._hearing_signals():
            for stage in self._pipeline.stages:
                if self._asked:
                    return STOPPED
                print(
                    f"\n\033[1m[{time.monotonic() - begun:3.0f}s] {stage.title}\033[0m", flush=True
                )
                if self._state.standing(stage).complete:
                    print(f"done before: {stage.name}", flush=True)
                elif code := self._make(stage):
                    return code
        return 0

    def _make(self, stage: Stage) -> int:
        if moved := self._state.begin(stage):
            print(moved, flush=True)
        code = self._wait_for(stage)
        if code:
            code = STOPPED if self._asked else code
            print(
                f"{stage.name} ended with exit code {code}; the same command continues from here",
                file=sys.stderr,
            )
            return code
        self._state.finish(stage)
        if not (standing := self._state.standing(stage)).complete:
            print(
                f"{stage.name} ended with exit code 0, but what it should have left is not "
                f"complete ({standing.progress or 'nothing is there'})",
                file=sys.stderr,
            )
            return 3
        return 0

    def command(self, stage: Stage) -> list[str]:
        """What is started for a stage."""
        if stage.kind != PROGRAM:
            script = str(self._checkout / "launch" / "local.sh")
            processes = str(self._pipeline.description.local.processes)
            return ["bash", script, processes, stage.kind, *stage.command]
        first, *rest = stage.command
        return [self._python if first == PYTHON else first, *rest]

    def _wait_for(self, stage: Stage) -> int:
        folder = os.path.dirname(self._python)
        path = f"{folder}:{os.environ['PATH']}" if folder else os.environ["PATH"]
        python_path = [str(self._checkout), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": ":".join(filter(None, python_path)),
        }
        # A session of its own: the terminal's Ctrl-C reaches this program alone, which passes on a
        # request to stop.
        self._child = subprocess.Popen(
            self.command(stage), cwd=self._checkout, env=environment, start_new_session=True
        )
        code = self._child.wait()
        self._child = None
        return code if code >= 0 else 128 - code

    @contextlib.contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        before = {}
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup is respected
                before[number] = signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        """Pass a stop request on to the stage. On a second one launch/local.sh ends it at once."""
        self._asked = True
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(sys.stderr.fileno(), b"\nstopping; the same command continues from here\n")
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)
