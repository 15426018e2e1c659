"""A rank that takes too long writes where it stands and ends.

The verdict names the rank that keeps the others waiting.
"""

import json
import os
import socket
import threading
import time

import pytest
import torch

from megatron_slm.monitoring import run_status
from megatron_slm.training.watchdog import EXIT_HUNG, Watchdog, Whereabouts, read_whereabouts


class Ends:
    """Stands for os._exit: remembers the code, and lets the test wait for it."""

    def __init__(self):
        self.codes, self.happened = [], threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


def watchdog(folder, end, **changes) -> Watchdog:
    settings = {"rank": 0, "world_size": 1, "step_seconds": 0.3, "other_seconds": 30.0}
    return Watchdog(folder, end=end, **(settings | changes))


def write_rank(folder, rank: int, *, age_seconds: float, step: int = 7, phase: str = "step"):
    (folder / "ranks").mkdir(exist_ok=True)
    place = {"rank": rank, "host": f"node{rank}", "pid": 100 + rank, "step": step, "phase": phase}
    clock = {"phase_seconds": 9.0, "written_at": time.time() - age_seconds}
    (folder / "ranks" / f"rank_{rank:05d}.json").write_text(json.dumps(place | clock))


def hang(folder, end, capsys, **changes) -> str:
    """A rank that finishes step 7 and nothing more; what it said."""
    run_status.begin(folder, steps=10)
    with watchdog(folder, end, **changes) as watched:
        watched.step_done(7)
        assert end.happened.wait(20)
    return capsys.readouterr().err


def test_a_rank_that_hangs_ends_with_its_own_code_and_leaves_its_stacks(tmp_path, capsys):
    end = Ends()
    said = hang(tmp_path, end, capsys)
    assert end.codes == [EXIT_HUNG]
    assert (
        f"rank 0 ({socket.gethostname()}, pid {os.getpid()}) waits for ever: in step after step 7"
        in said
    )
    stacks = (tmp_path / "ranks" / "rank_00000.step_00000007.stacks.txt").read_text()
    assert "test_watchdog.py" in stacks
    assert "every rank answers" in said
    status = run_status.read_status(tmp_path)
    assert (status.state, status.exit_code, status.step) == ("failed", EXIT_HUNG, 7)
    assert "the run hangs" in status.reason


def test_the_first_step_and_other_phases_may_take_longer(tmp_path):
    end = Ends()
    with watchdog(tmp_path, end) as watched:
        assert not end.happened.wait(0.7)  # the first step
        watched.step_done(1)
        with watched.phase("validation"):
            assert not end.happened.wait(0.7)
        watched.step_done(2)
    assert end.codes == []


def test_a_step_may_take_three_times_the_longest_one(tmp_path):
    """Large batches on slow machines are no hangs."""
    end = Ends()
    with watchdog(tmp_path, end, step_seconds=0.5) as watched:
        watched.step_done(1)
        time.sleep(0.4)
        watched.step_done(2)
        assert not end.happened.wait(0.9)
    assert end.codes == []


def test_a_step_that_is_finished_after_all_does_not_end_the_run(tmp_path):
    end = Ends()
    with watchdog(tmp_path, end, step_seconds=0.4) as watched:
        watched.step_done(1)
        time.sleep(0.47)
    assert end.codes == []


def test_a_stopped_rank_is_named(tmp_path, capsys):
    write_rank(tmp_path, 1, age_seconds=-60.0)  # as if it went on writing
    write_rank(tmp_path, 2, age_seconds=60.0)
    said = hang(tmp_path, Ends(), capsys, world_size=3)
    assert "rank 2 (node2, pid 102) does not answer" in said
    assert "node1" not in said


def test_a_rank_that_is_elsewhere_is_named(tmp_path, capsys):
    write_rank(tmp_path, 1, age_seconds=-60.0, phase="reading data")
    said = hang(tmp_path, Ends(), capsys, world_size=2)
    assert "rank 1 (node1, pid 101) is elsewhere: in reading data after step 7, for 9 s" in said


def test_only_the_lowest_rank_that_answers_gives_the_verdict(tmp_path, capsys):
    write_rank(tmp_path, 0, age_seconds=-60.0)
    said = hang(tmp_path, Ends(), capsys, rank=1, world_size=2)
    assert "rank 1" in said
    assert "the run hangs:" not in said


def test_a_rank_writes_where_it_is_while_it_works(tmp_path):
    with watchdog(tmp_path, Ends(), step_seconds=2.0, rank=3, world_size=4) as watched:
        watched.step_done(5)
        deadline = time.monotonic() + 20
        found: list[Whereabouts] = []
        while not (found and found[0].step == 5) and time.monotonic() < deadline:
            found = read_whereabouts(tmp_path / "ranks" / "rank_00003.json")
            watched.step_done(5)
            time.sleep(0.05)
    (here,) = found
    assert (here.rank, here.step, here.phase) == (3, 5, "step")
    assert not (tmp_path / "ranks" / "rank_00003.json").exists()  # an ended rank is nowhere


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path, capfd):
    end = Ends()
    (tmp_path / "ranks").write_text("no folder")
    with watchdog(tmp_path, end) as watched:
        watched.step_done(1)
        assert end.happened.wait(20)
    said = capfd.readouterr().err
    assert "could not be written" in said
    assert "test_watchdog.py" in said
    assert end.codes == [EXIT_HUNG]


def test_zero_seconds_watch_nothing(tmp_path):
    with watchdog(tmp_path, Ends(), step_seconds=0) as watched:
        watched.step_done(1)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_neighbour_is_noticed_in_the_middle_of_a_checkpoint(tmp_path, capsys):
    """A checkpoint may take long, but a rank that writes nothing meanwhile takes no part in it."""
    end = Ends()
    write_rank(tmp_path, 1, age_seconds=60.0, phase="saving a checkpoint")
    with watchdog(tmp_path, end, world_size=2) as watched:
        watched.step_done(7)
        with watched.phase("saving a checkpoint"):
            assert end.happened.wait(20)
    said = capsys.readouterr().err
    assert "rank 1 (node1, pid 101) does not answer" in said
    assert "last seen in saving a checkpoint after step 7" in said


def test_a_rank_that_has_ended_is_not_silent(tmp_path):
    end = Ends()
    write_rank(tmp_path, 1, age_seconds=0.0)
    with watchdog(tmp_path, end, world_size=2) as watched, watched.phase("validation"):
        time.sleep(0.1)
        (tmp_path / "ranks" / "rank_00001.json").unlink()
        assert not end.happened.wait(0.8)


@pytest.mark.parametrize("content", ["", "{}", '{"rank": 1', "[1]"])
def test_a_half_written_file_is_no_whereabouts(tmp_path, content):
    path = tmp_path / "rank_00001.json"
    path.write_text(content)
    assert read_whereabouts(path) == []


def test_a_flight_recorder_that_fails_does_not_keep_a_run_from_ending(
    tmp_path, capsys, monkeypatch
):
    def dump():
        raise RuntimeError("no NCCL here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", dump, raising=False)
    end = Ends()
    hang(tmp_path, end, capsys)
    assert end.codes == [EXIT_HUNG]
