"""status.json: what a run is doing, whole at every moment, and true after a kill."""

import datetime
import errno
import json
import os
import subprocess

import pytest

from megatron_slm.monitoring import run_status
from megatron_slm.monitoring.run_status import read_status


def test_a_run_from_its_start_to_its_end(tmp_path):
    run_status.begin(tmp_path, 20)
    first = read_status(tmp_path)
    assert (first.state, first.step, first.steps, first.exit_code) == ("running", 0, 20, None)
    assert first.pid == os.getpid()
    assert datetime.datetime.fromisoformat(first.started_at).utcoffset() == datetime.timedelta(0)
    run_status.progress(tmp_path, 8)
    assert read_status(tmp_path).step == 8
    run_status.end(tmp_path, "done", "trained", step=20, exit_code=0)
    last = read_status(tmp_path)
    assert (last.state, last.reason, last.step, last.exit_code) == ("done", "trained", 20, 0)
    assert last.started_at == first.started_at
    run_status.begin(tmp_path, 30)
    assert read_status(tmp_path).state == "running"


def test_the_file_holds_what_other_programs_read(tmp_path):
    run_status.begin(tmp_path, 20)
    assert set(json.loads((tmp_path / "status.json").read_text())) == {
        "state",
        "reason",
        "step",
        "steps",
        "exit_code",
        "started_at",
        "updated_at",
        "host",
        "pid",
    }


def test_the_first_failure_stays(tmp_path):
    run_status.begin(tmp_path, 20)
    run_status.end(tmp_path, "failed", "the cause", step=3, exit_code=3)
    run_status.progress(tmp_path, 4)
    standing = run_status.end(tmp_path, "failed", "a consequence", step=4, exit_code=1)
    assert standing == read_status(tmp_path)
    assert (standing.reason, standing.step, standing.exit_code) == ("the cause", 3, 3)


def test_a_killed_run_is_known_as_one(tmp_path):
    run_status.begin(tmp_path, 20)
    assert not read_status(tmp_path).was_killed
    ended = subprocess.Popen(["true"])
    ended.wait()
    content = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(content | {"pid": ended.pid}))
    assert read_status(tmp_path).was_killed
    (tmp_path / "status.json").write_text(
        json.dumps(content | {"pid": ended.pid, "host": "elsewhere"})
    )
    assert not read_status(tmp_path).was_killed


@pytest.mark.parametrize("content", [None, "", "[]", '{"state": "running"}', "\x00"])
def test_a_file_that_is_no_status_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None


def test_a_full_disk_stops_no_run(tmp_path, monkeypatch):
    run_status.begin(tmp_path, 20)

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    run_status.progress(tmp_path, 8)
    monkeypatch.undo()
    assert read_status(tmp_path).step == 0
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
