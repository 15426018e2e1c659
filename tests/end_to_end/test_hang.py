"""A rank that is stopped in the middle of a run: noticed in time, named, and the job ends with a
code of its own.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from tests.end_to_end.small_run import ROOT, command, environment

HANG_SECONDS = 4
PATIENCE_SECONDS = 300  # two processes import megatron-core, on a machine that may be busy


def test_a_stopped_rank_is_noticed_and_named(corpus, tmp_path):
    run = tmp_path / "run"
    settings = ("--monitoring.hang_seconds", str(HANG_SECONDS), "--schedule.train_steps", "1000000")
    arguments = command(corpus, run, *settings, processes=1)
    launcher = [str(ROOT / "launch" / "processes.py"), "--standalone", "--nproc-per-node=2"]
    job = subprocess.Popen(
        [sys.executable, *launcher, *arguments[1:]],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stopped = wait_for_step(run, rank=1, step=3)
        os.kill(stopped["pid"], signal.SIGSTOP)
        _, said = job.communicate(timeout=PATIENCE_SECONDS)
    except BaseException:
        end_ranks(run)
        raise
    finally:
        job.kill()
    assert job.returncode == 86
    assert f"rank 1 ({stopped['host']}, pid {stopped['pid']}) does not answer" in said
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 86)
    (stacks,) = (run / "ranks").glob("rank_00000.step_*.stacks.txt")
    assert "loop.py" in stacks.read_text()


def end_ranks(run) -> None:
    """After a failure they may still train, or be stopped for ever."""
    for path in (run / "ranks").glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)


def wait_for_step(run, rank: int, step: int) -> dict:
    """What a rank last wrote of itself, once it has finished `step` steps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    path = run / "ranks" / f"rank_{rank:05d}.json"
    while time.monotonic() < deadline:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {"step": 0}
        if found["step"] >= step:
            return found
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} did not come to step {step}")
