"""The parts of `python -m benchmarks.gpu`: which program measures what, as commands.

A part is a program with named cases that prints one JSON line per case as it is done, or one file
of tests/gpu. Parts run as processes of their own, so that none meets what another left in memory.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks import head, layer_passes, selected_set, step, topk

ROOT = Path(__file__).resolve().parents[1]
SMOKE_STEP = ["--layers", "1", "--hidden", "64", "--vocab", "512", "--seq", "32", "--mbs", "2"]
SMOKE_HEAD = ["--n", "64", "--hidden", "32", "--vocab", "256"]
SMOKE_PAIR = [*SMOKE_STEP, "--steps", "2", "--tokens", "256", "--device", "cpu"]
ONE_ROUND = ["--rounds", "1", "--device", "cpu"]


@dataclass(frozen=True)
class Part:
    """One program and its cases."""

    name: str
    cases: tuple[str, ...]
    command: Callable[[list[str]], list[str]]
    """The arguments of Python that measure these cases."""
    seconds_per_case: float
    """About, on an H200: for --dry-run."""


def gpu_parts() -> list[Part]:
    """Every G case, the passes of the layers, the loop, then every file of tests/gpu."""
    return [
        _program("step", step.CASES, "G", 20),
        _program("head", head.CASES, "G", 6),
        _program("topk", topk.CASES, "G", 3),
        _program("selected_set", selected_set.CASES, "G", 45),
        Part("layer_passes", tuple(layer_passes.CASES), _passes_command, 10),
        Part("train_loop", ("train-loop",), _loop_command, 60),
        Part("tests", _test_files(), _test_command, 25),
    ]


def smoke_parts() -> list[Part]:
    """The same machinery on a CPU with cases too small to mean anything."""
    return [
        _program("step", {"C8": None}, "C", 20, [*SMOKE_STEP, *ONE_ROUND]),
        _program("head", {"C1": None, "C4": None}, "C", 5, [*SMOKE_HEAD, *ONE_ROUND]),
        _program("topk", topk.CASES, "G", 5, ["--n", "4096", *ONE_ROUND]),
        _program("selected_set", selected_set.CASES, "G", 20, SMOKE_PAIR),
        Part(
            "layer_passes",
            tuple(layer_passes.CASES),
            lambda chosen: [*_passes_command(chosen), "--smoke", *ONE_ROUND],
            5,
        ),
    ]


def _program(
    name: str, cases: dict, letter: str, seconds_per_case: float, options: list[str] | None = None
) -> Part:
    def command(chosen: list[str]) -> list[str]:
        return ["-m", f"benchmarks.{name}", "--case", ",".join(chosen), *(options or [])]

    names = tuple(case for case in cases if case.startswith(letter))
    return Part(name, names, command, seconds_per_case)


def _passes_command(chosen: list[str]) -> list[str]:
    return ["-m", "benchmarks.layer_passes", "--case", ",".join(chosen)]


def _loop_command(_: list[str]) -> list[str]:
    return ["-m", "benchmarks.train_loop", "--device", "cuda", "--steps", "10"]


def _test_files() -> tuple[str, ...]:
    return tuple(path.name for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")))


def _test_command(chosen: list[str]) -> list[str]:
    """One file: its result is read when it has ended, so a cut-off run keeps those before."""
    (file,) = chosen
    return ["-m", "benchmarks.gpu_parts", file]


def rows_of(part: Part, cases: list[str], deadline: float) -> Iterator[dict]:
    """Run the cases of a part and yield their rows as they come.

    A program that dies takes one case with it: the first that has no row yet gets one with the
    error, and the program starts again with those after it. Nothing is started after `deadline`
    (of time.monotonic), and what runs then is ended; its unfinished cases get no row.
    """
    left = list(cases)
    while left and time.monotonic() < deadline:
        asked = left[:1] if part.name == "tests" else left
        done = set()
        with tempfile.TemporaryFile("w+") as errors:
            process = _Process(part.command(asked), errors)
            for row in process.rows(deadline):
                done.add(row.get("case"))
                yield row
            left = [case for case in left if case not in done]
            unfinished = [case for case in asked if case in left]
            if unfinished and not process.was_ended:
                yield {"case": unfinished[0], "failed": process.last_words()}
                left.remove(unfinished[0])


class _Process:
    """A measuring process: its rows, and what it said last."""

    def __init__(self, arguments: list[str], errors: IO[str]):
        self._errors = errors
        # A session of its own: what it started is ended with it.
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        self.was_ended = False

    def rows(self, deadline: float) -> Iterator[dict]:
        """The lines that are JSON objects; other lines are not ours (a library's)."""
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._end)
        timer.start()
        try:
            for line in self._process.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
            self._process.wait()
        finally:
            timer.cancel()
            if self._process.poll() is None:
                self._end()
                self._process.wait()

    def _end(self) -> None:
        self.was_ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"exit code {self._process.returncode}: {lines[-1] if lines else 'no message'}"


def test_results(file: str) -> dict:
    """Run one file of tests/gpu; counts, failures by name, and the reasons of skips."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-m", "gpu", f"tests/gpu/{file}", f"--junitxml={report}"]
        # Its output is not ours, and may be needed to understand a failure.
        subprocess.run([sys.executable, *command], cwd=ROOT, stdout=sys.stderr, check=False)
        return read_junit(file, report)


def read_junit(file: str, report: Path) -> dict:
    """One row of a file's tests from pytest's junit report."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = {}
    skips = set()
    for case in cases:
        for outcome in case:
            if outcome.tag in ("failure", "error"):
                bad[case.get("name")] = (outcome.get("message") or "").splitlines()[:1]
            elif outcome.tag == "skipped":
                skips.add(outcome.get("message") or "")
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "case": file,
        "passed": len(cases) - len(bad) - skipped,
        "failed_tests": bad,
        "skipped_tests": skipped,
        "skip_reasons": sorted(skips),
        "missed": bool(bad),
    }


if __name__ == "__main__":
    print(json.dumps(test_results(sys.argv[1])), flush=True)
