"""What a stack says of a thread: its phase, or that it waits for others; and that the functions
which tell the phases are where they are looked for.
"""

import importlib
import inspect
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_slm.monitoring.slow_ranks import COMPUTE, OTHER, PHASES
from megatron_slm.training.busy_time import PHASE_OF_FUNCTION, WAITING, BusyTime, DeviceTime


@pytest.mark.parametrize("place", PHASE_OF_FUNCTION)
def test_the_functions_that_tell_a_phase_are_there(place):
    """Renamed or moved, their time would count as "everything else" and nobody would notice."""
    file, name = place
    module = importlib.import_module("megatron_slm." + file.removesuffix(".py").replace("/", "."))
    defined = [value for _, value in inspect.getmembers(module, inspect.isclass)]
    assert any(callable(getattr(each, name, None)) for each in [module, *defined])


def stack_of(function) -> str:
    """The phase of a thread that is inside `function`, which is given an event to wait for."""
    inside, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=function, args=(inside, go_on))
    thread.start()
    inside.wait(10)
    try:
        return BusyTime().phase_of(sys._current_frames()[thread.ident])
    finally:
        go_on.set()
        thread.join()


def in_file(path: str, name: str):
    """A function `name` of a file `path` that is entered until it is told to go on."""
    lines = (f"def {name}(inside, go_on):", "inside.set()", "while not go_on.is_set():", "    pass")
    source = "\n    ".join(lines) + "\n"
    namespace: dict = {}
    exec(compile(source, path, "exec"), namespace)
    return namespace[name]


def test_the_innermost_known_function_tells_the_phase():
    assert stack_of(in_file("/x/megatron_slm/training/step.py", "train_step")) == COMPUTE
    assert stack_of(in_file("/x/megatron_slm/training/other.py", "train_step")) == OTHER


def test_a_frame_at_an_instruction_without_a_line_has_a_phase_too():
    path = "/x/megatron_slm/training/step.py"
    code = in_file(path, "train_step").__code__
    frame = SimpleNamespace(f_code=code, f_lineno=None, f_back=None)
    assert BusyTime().phase_of(frame) == COMPUTE


def test_a_collective_is_no_work():
    assert stack_of(in_file(dist.distributed_c10d.__file__, "all_reduce")) == WAITING


def test_a_handle_that_is_waited_for_is_no_work(tmp_path):
    """megatron-core starts collectives and waits for them later, outside torch's functions."""
    path = tmp_path / "overlap.py"
    path.write_text("def f(handle):\n    handle.wait()\n")
    namespace: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)

    found: list = []
    handle = SimpleNamespace(wait=lambda: found.append(BusyTime().phase_of(sys._getframe(1))))
    namespace["f"](handle)
    assert found == [WAITING]


def test_seconds_are_added_up_and_taken_once():
    busy = BusyTime()
    busy.start()
    while not sum(busy._seconds.values()):
        sum(range(1000))
    busy.close()
    taken = busy.take()
    assert len(taken) == len(PHASES)
    assert sum(taken) > 0
    assert sum(busy.take()) == 0


class Event:
    """Stands in for torch.cuda.Event: the device's clock is a list of seconds, one a record."""

    clock: list[float]

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at_seconds = self.clock.pop(0)

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.at_seconds - self.at_seconds)


def test_a_device_is_timed_from_the_start_of_a_step_to_the_first_reduction(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.clock = [10.0, 10.5, 20.0, 21.0, 30.0]
    reduced: list = []
    model = SimpleNamespace(finish_grad_sync=lambda **named: reduced.append(named))
    device = DeviceTime([model])
    for _ in range(2):
        device.step_begins()
        model.finish_grad_sync(force_all_reduce=False)
        model.finish_grad_sync(force_all_reduce=True)
    assert device.take() == 0.5, "the second step is not closed yet"
    device.step_begins()
    assert device.take() == 1.0
    assert [each["force_all_reduce"] for each in reduced] == [False, True] * 2
