"""A request to stop, by signal or by file, is heard once, after a step, on a world of one process."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_slm.training.signals import EXIT_RESUME, STOP_FILE, StopRequest


@pytest.fixture(autouse=True)
def world_of_one():
    """A process group of this process alone; the signal handlers of the test process are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def stop(tmp_path):
    return StopRequest(tmp_path, torch.device("cpu"))


def test_nobody_asked(stop):
    assert stop.agreed() is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_does_not_end_the_process_but_asks(stop, number):
    os.kill(os.getpid(), number)
    assert stop.agreed() is True and stop.agreed() is True


def test_the_file_asks_and_is_cleared(stop, tmp_path):
    (tmp_path / STOP_FILE).touch()
    assert stop.agreed() is True
    assert stop.clear() == ""
    assert not (tmp_path / STOP_FILE).exists() and stop.agreed() is False
    stop.clear()  # nothing to remove is no error


def test_a_file_that_cannot_be_removed_is_named(stop, tmp_path, monkeypatch):
    def read_only(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", read_only)
    problem = stop.clear()
    assert str(tmp_path / STOP_FILE) in problem and "Read-only" in problem


def test_the_names_that_batch_scripts_rely_on():
    assert (EXIT_RESUME, STOP_FILE) == (85, "stop_requested")
