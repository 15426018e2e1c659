"""The tools around training: each does what its setting says, and puts back what it changed."""

import datetime
import gc
import gzip
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config
from megatron_slm.training.flight_recorder import record_collectives
from megatron_slm.training.garbage import GarbageCollection
from megatron_slm.training.memory_snapshot import MemorySnapshot
from megatron_slm.training.profiler import StepProfiler
from megatron_slm.training.step_timeout import StepTimeout, set_collective_timeout
from megatron_slm.training.tools import TrainingTools

CPU = torch.device("cpu")


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.myself = self


def test_garbage_is_collected_after_every_nth_step_and_not_between():
    gc.enable()
    with GarbageCollection(3) as garbage:
        assert not gc.isenabled()
        gone = weakref.ref(Cycle())
        for step in (1, 2):
            garbage.after_step(step)
        assert gone() is not None
        garbage.after_step(3)
        assert gone() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_python_decides_when_the_interval_is_0():
    gc.enable()
    with GarbageCollection(0) as garbage:
        assert gc.isenabled()
        garbage.after_step(1)


def timeout_of(tmp_path, *, whole=30, step=10, hang_seconds=60):
    config = Config()
    config.device.timeout_minutes, config.device.step_timeout_minutes = whole, step
    config.monitoring.hang_seconds = hang_seconds
    changes = []
    return StepTimeout(config, changes.append), changes


def test_the_timeout_is_lower_in_steps_and_whole_around_them(tmp_path):
    timeout, changes = timeout_of(tmp_path)
    with timeout:
        assert changes == [], "the first step may compile and connect"
        timeout.after_step()
        timeout.after_step()
        with timeout.lifted():
            assert changes == [600.0, 1800.0]
    assert changes == [600.0, 1800.0, 600.0, 1800.0]


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        (dict(step=1, hang_seconds=300), [600.0]),  # the watchdog comes first
        (dict(step=60), []),  # never above the other one
        (dict(step=0), []),
        (dict(hang_seconds=0), []),  # the run may be stopped in a debugger
    ],
)
def test_the_lower_timeout_leaves_the_watchdog_its_time(settings, seconds, tmp_path):
    timeout, changes = timeout_of(tmp_path, **settings)
    timeout.__enter__()
    timeout.after_step()
    assert changes == seconds


def test_every_group_gets_the_timeout():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        other = dist.new_group([0])
        set_collective_timeout(7.0)
        for group in (dist.group.WORLD, other):
            backend = group._get_backend(CPU)
            assert backend.options._timeout == datetime.timedelta(seconds=7)
    finally:
        dist.destroy_process_group()


def test_the_profiler_records_its_window(tmp_path):
    said = []
    recorder = StepProfiler(
        [2, 3], tmp_path, 4, done_steps=0, report=lambda text, level: said.append((text, level))
    )
    with recorder:
        for step in range(1, 6):
            torch.full((3,), float(step)).sum()
            recorder.after_step(step)
    [trace] = (tmp_path / "profile").iterdir()
    assert trace.name == "rank_00004.steps_2_3.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::full" for event in events) == 2
    assert said == [(f"the profile of steps 2 to 3 is in {trace}", "info")]


def test_a_run_that_ends_in_the_window_has_its_beginning(tmp_path):
    with StepProfiler([2, 9], tmp_path, 0, done_steps=5, report=lambda *_: None) as recorder:
        recorder.after_step(6)
    [trace] = (tmp_path / "profile").iterdir()
    assert trace.name == "rank_00000.steps_6_6.json.gz"


@pytest.mark.parametrize("window", [[3], [5, 4], [1, 2, 3]])
def test_a_window_is_first_and_last_step(window):
    config = Config()
    config.monitoring.profile_steps = window
    config.data.train, config.data.tokenizer, config.schedule.train_steps = ["c"], "t", 1
    with pytest.raises(ConfigError, match="monitoring.profile_steps: got"):
        check_config(config, 1)


def test_a_memory_snapshot_needs_a_gpu(tmp_path):
    config = Config()
    config.monitoring.memory_snapshot, config.device.kind = True, "cpu"
    config.data.train, config.data.tokenizer, config.schedule.train_steps = ["c"], "t", 1
    with pytest.raises(ConfigError, match="monitoring.memory_snapshot: got true"):
        check_config(config, 1)
    said = []
    with MemorySnapshot(
        True, CPU, tmp_path, rank=0, world_size=1, report=lambda *message: said.append(message)
    ):
        pass
    [(text, level)] = said
    assert "records nothing" in text
    assert level == "warning"


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(1, "memory_snapshot.pickle"), (8, "memory_snapshot.rank_00003.pickle")],
)
def test_running_out_of_memory_writes_the_snapshot(world_size, name, tmp_path, monkeypatch, capsys):
    """With stand-ins for the two calls into CUDA's allocator."""
    written, switched = [], []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: switched.append(options)
    )
    snapshot = MemorySnapshot(
        True,
        torch.device("cuda"),
        tmp_path,
        rank=3,
        world_size=world_size,
        report=lambda *_: None,
    )
    with pytest.raises(torch.OutOfMemoryError), snapshot:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert written == [str(tmp_path / name)]
    assert switched[-1] == {"enabled": None}
    assert name in capsys.readouterr().err
    with pytest.raises(ValueError, match="other"), snapshot:
        raise ValueError("other")
    assert len(written) == 1


def test_the_flight_recorder_writes_into_the_run_folder(tmp_path):
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    record_collectives(2000, tmp_path, environment)
    assert (tmp_path / "ranks").is_dir()
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "7",  # what was set stays
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/ranks/nccl_timeout_rank_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/ranks/nccl_timeout_rank_",
    }


def test_no_flight_recorder_is_no_buffer(tmp_path):
    environment: dict[str, str] = {}
    record_collectives(0, tmp_path, environment)
    assert set(environment.values()) == {"0"}
    assert not (tmp_path / "ranks").exists()


def tools_of(tmp_path, hook) -> TrainingTools:
    config = Config()
    config.run.folder, config.monitoring.after_step = str(tmp_path), "mine.py:hook"
    config.device.step_timeout_minutes = 0  # there is no process group here
    groups = SimpleNamespace(world_rank=0, world_size=1, device=CPU)
    return TrainingTools(config, groups, done_steps=0, report=lambda *_: None, hook=hook)


def test_the_hook_hears_of_every_step(tmp_path):
    heard = []
    with tools_of(tmp_path, lambda step, metrics: heard.append((step, metrics))) as tools:
        tools.after_step(1, {"optimizer/grad_norm": 0.5})
        tools.after_step(2, {})
    assert heard == [(1, {"optimizer/grad_norm": 0.5}), (2, {})]


def test_a_hook_that_fails_is_named(tmp_path):
    def hook(step, metrics):
        raise KeyError("loss")

    with (
        pytest.raises(
            RuntimeError, match=r"monitoring.after_step: mine.py:hook failed after step 3"
        ),
        tools_of(tmp_path, hook) as tools,
    ):
        tools.after_step(3, {})
    assert gc.isenabled()


def test_a_tool_that_cannot_be_entered_leaves_garbage_collection_on(tmp_path, monkeypatch):
    tools = tools_of(tmp_path, None)

    def fails():
        raise RuntimeError("the profiler is in use")

    monkeypatch.setattr(tools.profiler, "_start_where_due", fails)
    with pytest.raises(RuntimeError, match="in use"), tools:
        pass
    assert gc.isenabled()
