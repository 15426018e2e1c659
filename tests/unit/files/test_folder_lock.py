"""A folder has one writer: a living one is named, a dead one's lock is taken over, whatever the
file system can tell.
"""

import dataclasses
import fcntl
import json
import os
import socket
import subprocess
import threading

import pytest

from megatron_slm.files import folder_lock
from megatron_slm.files.folder_lock import FolderInUse, FolderLock, Owner, process_began


def lock_of(folder, reports=None, **seconds):
    report = (reports if reports is not None else []).append
    times = {"beat_seconds": 0.05, "silence_seconds": 0.3} | seconds
    return FolderLock(folder, "a training run", "Give another folder", report=report, **times)


def leave_lock(folder, **changes):
    """A lock file as a process of these properties would have left it; nothing holds the kernel's
    lock.
    """
    owner = dataclasses.replace(Owner.this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(owner)))


@pytest.fixture
def dead_pid():
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


@pytest.fixture(params=["with kernel locks", "without kernel locks"])
def file_system(request, monkeypatch):
    if request.param == "without kernel locks":
        monkeypatch.setattr(folder_lock, "_try_kernel_lock", lambda descriptor: None)


def test_a_second_process_is_told_who_the_first_is(tmp_path, file_system):
    with lock_of(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / "lock").read_text())
        with pytest.raises(FolderInUse) as refused:
            lock_of(tmp_path / "run").acquire()
    assert f"process {os.getpid()} on {socket.gethostname()}, since " in str(refused.value)
    assert owner["started_at"] in str(refused.value)


def test_the_lock_goes_with_its_owner_and_an_empty_folder_it_made(tmp_path):
    with lock_of(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run").exists()


def test_files_made_meanwhile_stay(tmp_path):
    with lock_of(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("x")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, file_system, dead_pid):
    leave_lock(tmp_path / "run", pid=dead_pid)
    reports = []
    with lock_of(tmp_path / "run", reports):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert len(reports) == 1
    assert f"taken over from process {dead_pid}" in reports[0]


def test_a_process_id_that_is_used_again_is_another_process(tmp_path, file_system):
    leave_lock(tmp_path / "run", pid=os.getppid(), process_began="1")
    with lock_of(tmp_path / "run"):
        pass


def test_a_living_process_is_believed_where_the_kernel_forgot_its_lock(tmp_path):
    parent = os.getppid()
    leave_lock(tmp_path / "run", pid=parent, process_began=process_began(parent))
    with pytest.raises(FolderInUse, match=f"process {parent} "):
        lock_of(tmp_path / "run").acquire()


def test_a_lock_that_the_kernel_keeps_for_a_dead_owner_is_replaced(tmp_path, dead_pid):
    leave_lock(tmp_path / "run", pid=dead_pid)
    with open(tmp_path / "run" / "lock") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        with lock_of(tmp_path / "run"), pytest.raises(FolderInUse):
            lock_of(tmp_path / "run").acquire()


def test_a_silent_lock_of_another_machine_is_watched_and_taken_over(tmp_path, file_system):
    leave_lock(tmp_path / "run", host="node7", machine="another")
    reports = []
    with lock_of(tmp_path / "run", reports):
        pass
    assert "watched" in reports[0]
    assert "node7" in reports[0]
    assert "taken over" in reports[1]


def test_a_lock_of_another_machine_that_is_touched_is_refused(tmp_path, file_system):
    leave_lock(tmp_path / "run", host="node7", machine="another")
    path = tmp_path / "run" / "lock"
    done = threading.Event()

    def touch():
        while not done.wait(0.02):
            os.utime(path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with pytest.raises(FolderInUse, match="on node7, since"):
            lock_of(tmp_path / "run", silence_seconds=60).acquire()
    finally:
        done.set()
        toucher.join()


def test_an_owner_touches_its_lock(tmp_path):
    with lock_of(tmp_path / "run"):
        path = tmp_path / "run" / "lock"
        os.utime(path, (0, 0))
        beaten = threading.Event()
        for _ in range(1000):
            if path.stat().st_mtime > 0:
                break
            beaten.wait(0.01)
        assert path.stat().st_mtime > 0


def test_a_process_whose_folder_was_taken_over_ends(tmp_path, monkeypatch):
    codes = []
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    reports = []
    with lock_of(tmp_path / "run", reports):
        (tmp_path / "run" / "lock").unlink()
        leave_lock(tmp_path / "run", host="node8")
        assert ended.wait(60)
    assert codes[0] == 4
    assert "taken over by" in reports[0]
    assert "node8" in reports[0]


def test_a_forked_child_gives_nothing_back(tmp_path):
    with lock_of(tmp_path / "run") as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / "run" / "lock").exists()


def test_a_file_of_a_killed_writer_is_nobodys(tmp_path):
    (tmp_path / "lock").write_text('{"host": "no')
    with lock_of(tmp_path):
        pass
