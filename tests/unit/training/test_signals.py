"""A request to stop, by signal or by file, is heard after a step; a world of one process."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_slm.training.signals import (
    CHECK_SECONDS,
    CHECK_STEPS,
    EXIT_RESUME,
    STOP_FILE,
    StopRequest,
)
from megatron_slm.training.stop_signals import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def world_of_one():
    """A process group of this process alone; the test process gets its signal handlers back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # a test run under nohup ignores some
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def stop(tmp_path):
    with StopSignals("stopping") as signals:
        yield StopRequest(tmp_path, torch.device("cpu"), signals)


def test_nobody_asked(stop):
    assert stop.agreed() is False


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_does_not_end_the_process_but_asks(stop, number):
    os.kill(os.getpid(), number)
    assert stop.agreed() is True
    assert stop.agreed() is True


def test_the_file_asks_and_is_cleared(stop, tmp_path):
    (tmp_path / STOP_FILE).touch()
    assert stop.agreed() is True
    stop.clear()
    assert not (tmp_path / STOP_FILE).exists()
    assert stop.agreed() is False
    stop.clear()  # nothing to remove is no error


def test_a_file_that_cannot_be_removed_is_named(stop, tmp_path, monkeypatch):
    def read_only(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    problem = stop.clear()
    assert str(tmp_path / STOP_FILE) in problem
    assert "Read-only" in problem


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def steps_until_a_check(stop, *, at_most: int = 30) -> int:
    """After how many steps the ranks agree next."""
    return next(step for step in range(1, at_most) if stop.is_due())


@pytest.mark.parametrize(
    ("step_seconds", "ready_steps", "expected"),
    [
        (0.01, 100, CHECK_STEPS),  # fast steps: the number of steps decides
        (CHECK_SECONDS / 3, 100, 3),  # slower ones: their time
        (10 * CHECK_SECONDS, 100, 1),  # a step of a minute: after every one, as before
        (0.01, 2, 2),  # what some rank has not read yet may turn out to be unreadable
        (0.01, 0, 1),
    ],
)
def test_the_ranks_agree_after_so_many_steps_or_seconds(
    step_seconds, ready_steps, expected, tmp_path
):
    clock = Clock()
    stop = StopRequest(tmp_path, torch.device("cpu"), clock=clock)
    stop.agreed()  # before the first step, of which nothing is known
    assert steps_until_a_check(stop) == 1
    clock.seconds += step_seconds
    stop.agreed(ready_steps=ready_steps)
    assert steps_until_a_check(stop) == expected


def test_the_ranks_always_agree_after_the_last_step(tmp_path):
    stop = StopRequest(tmp_path, torch.device("cpu"), clock=Clock())
    stop.is_due()
    stop.agreed(ready_steps=100)
    assert not stop.is_due()
    assert stop.is_due(last_step=True)


def test_a_request_between_two_checks_is_heard_at_the_next_one(stop, tmp_path):
    stop.is_due()
    assert stop.agreed(ready_steps=100) is False
    (tmp_path / STOP_FILE).touch()
    assert 1 < steps_until_a_check(stop) <= CHECK_STEPS
    assert stop.agreed(ready_steps=100) is True


def test_the_names_that_batch_scripts_rely_on():
    assert (EXIT_RESUME, STOP_FILE) == (85, "stop_requested")


def test_ctrl_c_says_what_happens_and_how_to_end_at_once(stop, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.agreed() is True
    assert "stopping; Ctrl-C again ends it at once" in capfd.readouterr().err


def test_what_was_ignored_at_the_start_stays_ignored():
    """nohup ignores SIGHUP, and a shell ignores the SIGINT of what it starts in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals("stopping") as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.asked == ""


def test_a_request_may_end_the_program_where_it_stands():
    def leave() -> None:
        raise SystemExit(85)

    with pytest.raises(SystemExit) as left, StopSignals("stopping", on_request=leave):
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 85


def run(program: str) -> subprocess.CompletedProcess:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=buffered,
        capture_output=True,
        text=True,
    )


def test_a_second_ctrl_c_ends_the_process_by_the_signal():
    done = run("""
        import os, signal, time
        from megatron_slm.training.stop_signals import StopSignals
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with StopSignals("stopping"):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # the same request, as `timeout` would send it
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
    """)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "Traceback" not in done.stderr


def test_signals_close_together_are_one_request():
    with StopSignals("stopping") as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == "SIGINT"


def test_a_closed_output_does_not_change_the_exit_code():
    """Python ends with 120 when what it still had to print cannot be written."""
    done = run("""
        import os, signal, sys
        from megatron_slm.training.stop_signals import StopSignals

        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        with StopSignals("stopping"):
            os.kill(os.getpid(), signal.SIGHUP)
            print("last words")
        sys.exit(85)
    """)
    assert (done.returncode, done.stderr) == (85, "")


def test_a_process_that_was_asked_keeps_its_exit_code_when_it_is_signalled_while_it_ends():
    """torchrun signals the other workers as soon as the first has ended."""
    done = run("""
        import atexit, os, signal, sys
        from megatron_slm.training.stop_signals import StopSignals

        with StopSignals("stopping"):
            os.kill(os.getpid(), signal.SIGTERM)
        atexit.register(os.kill, os.getpid(), signal.SIGTERM)
        sys.exit(85)
    """)
    assert done.returncode == 85, done.stderr
