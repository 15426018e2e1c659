"""launch/train.sbatch with the real trainer and a tiny model, on two nodes of a real SLURM.

One short test runs every time; the others are marked slow.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.monitoring.run_status import read_status
from tests.end_to_end.small_run import command, compared, environment, lines
from tests.slurm.cluster import ENDED, ROOT, Cluster, Job, free_ports

LONG = 400  # steps: seconds of work on an idle core, so that a signal comes in the middle


def settings(corpus: Path, run: Path, steps: int = LONG, *more: str) -> list[str]:
    """What comes after the script's name."""
    words = command(corpus, run, processes=1)
    every = ["--checkpoint.interval_steps", "1000", "--monitoring.log_interval_steps", "10"]
    return [*words[3:], *every, "--schedule.train_steps", str(steps), *more]


def submit(cluster: Cluster, *words: str | Path, **variables: str) -> Job:
    options = ["--nodes=2", "--nodelist=n1,n2", "--time=20"]
    return cluster.submit(*options, "launch/train.sbatch", *words, **variables)


def logged_step(run: Path) -> int:
    return max((record["step"] for record in lines(run)), default=0)


def wait_for_steps(job: Job, run: Path, step: int = 10) -> None:
    job.wait_for(lambda: logged_step(run) >= step or job.state in ENDED, f"step {step}")
    assert logged_step(run) >= step, job.text


def bring_back(cluster: Cluster, node: str) -> None:
    """Put a node that was set down into service; one that answers may have come back by itself."""
    cluster.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)


def uninterrupted(corpus: Path, run: Path, steps: int) -> list[dict]:
    """The log of the same run, by launch/processes.py alone and never stopped."""
    start = [sys.executable, ROOT / "launch" / "processes.py", "--nproc-per-node=2"]
    [port] = free_ports(1)
    done = subprocess.run(
        [
            *start,
            f"--master-port={port}",
            "-m",
            "megatron_slm.train",
            *settings(corpus, run, steps),
        ],
        env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return compared(run)


def test_near_the_limit_two_nodes_stop_are_requeued_and_end_with_the_same_losses(
    cluster, corpus, tmp_path
):
    run = tmp_path / "run"
    job = submit(cluster, *settings(corpus, run, 300))
    wait_for_steps(job, run)
    job.warn()
    expected = uninterrupted(corpus, tmp_path / "whole", 300)  # while SLURM waits to start it again
    assert job.wait_for_end() == "COMPLETED", job.text
    assert (job.exit_code, job.restarts) == (0, 1), job.text
    [stopped] = re.findall(r"went from step 0 to (\d+)", job.text)
    assert 10 <= int(stopped) < 300
    assert f"at step {stopped}\n" in job.text
    assert f"resumed after step {stopped}" in job.text
    assert compared(run) == expected
    assert not (run / "stop_requested").exists()


@pytest.mark.slow
def test_srun_starts_every_process_and_the_job_is_requeued_just_so(cluster, corpus, tmp_path):
    run = tmp_path / "run"
    every = {"SLM_LAUNCH": "srun", "SLM_PROCESSES_PER_NODE": "2"}
    options = ["--nodes=2", "--time=20", "--cpus-per-task=2", "launch/train.sbatch"]
    words = settings(corpus, run, 200, "--data.micro_batch_size", "2")
    job = cluster.submit(*options, *words, **every)
    wait_for_steps(job, run)
    assert len(job.processes("megatron_slm.train")) == 4
    job.warn()
    assert job.wait_for_end() == "COMPLETED", job.text
    assert (job.exit_code, job.restarts) == (0, 1), job.text
    assert "2 nodes x 2 processes (srun)" in job.text


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(cluster, corpus, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, *settings(corpus, run))
    wait_for_steps(job, run)
    cluster.call("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    job.wait_for(lambda: "stopped at step" in job.text, "the last word of the job")
    assert "SLURM has not put the job back into the queue" in job.text
    assert job.restarts == 0
    assert (run / "checkpoints" / "latest").exists()
    assert read_status(run).state == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scontrol requeue", "node down"])
def test_a_job_that_slurm_takes_back_goes_on(cluster, corpus, tmp_path, how):
    run = tmp_path / "run"
    job = submit(cluster, *settings(corpus, run))
    wait_for_steps(job, run)
    if how == "node down":
        cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
        job.wait_for(lambda: job.restarts == 1, "the requeue")
        bring_back(cluster, "n2")
    else:
        cluster.call("scontrol", "requeue", job.number)
    assert job.wait_for_end(400) == "COMPLETED", job.text
    assert (job.exit_code, job.restarts) == (0, 1)
    assert "SLURM has put the job back into the queue, where it continues" in job.text
    assert logged_step(run) == LONG


@pytest.mark.slow
def test_a_node_that_crashes_ends_the_run_at_once_and_the_job_goes_on(cluster, corpus, tmp_path):
    """SLURM needs SlurmdTimeout, which is 20 s here, to see that the node is gone."""
    run = tmp_path / "run"
    words = settings(corpus, run, LONG, "--checkpoint.interval_steps", "20")
    job = cluster.submit("--nodes=2", "--time=20", "launch/train.sbatch", *words)
    wait_for_steps(job, run, 30)
    assert job.record["NodeList"] == "n[1-2]"
    cluster.crash("n2")
    try:
        job.wait_for(lambda: not job.processes("megatron_slm.train"), "the end of the run", 60)
        assert job.restarts == 0, "the processes did not wait for SLURM to notice"
        assert job.wait_for_end(400) == "COMPLETED", job.text
        assert job.record["NodeList"] == "n[1,3]"
    finally:
        cluster.start_node("n2")
        bring_back(cluster, "n2")
    assert (job.exit_code, job.restarts) == (0, 1)
    resumed = re.findall(r"^resumed after step (\d+)", job.text, re.MULTILINE)
    assert len(resumed) == 1, job.text
    assert int(resumed[0]) >= 20
    assert logged_step(run) == LONG


@pytest.mark.slow
def test_a_spare_node_takes_the_place_of_one_that_is_set_down(cluster, corpus, tmp_path):
    run = tmp_path / "run"
    words = settings(corpus, run, LONG, "--checkpoint.interval_steps", "20")
    options = ["--nodes=2-3", "--no-kill", "--time=20"]
    job = cluster.submit(*options, "launch/train.sbatch", *words, SLM_NODES="2")
    wait_for_steps(job, run, 30)
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for(lambda: "going on with n1,n3" in job.text, "the second step")
    bring_back(cluster, "n2")
    assert job.wait_for_end() == "COMPLETED", job.text
    assert (job.exit_code, job.restarts, logged_step(run)) == (0, 0, LONG), job.text


@pytest.mark.slow
def test_a_process_that_is_killed_gives_the_job_its_code(cluster, corpus, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, *settings(corpus, run))
    wait_for_steps(job, run)
    os.kill(job.processes("megatron_slm.train")[0], signal.SIGKILL)
    assert job.wait_for_end() == "FAILED"
    assert job.exit_code == 137, job.text
    assert "failed with exit code 137; not requeued" in job.text


@pytest.mark.slow
def test_missing_data_is_said_once_before_the_nodes_start(cluster, corpus, tmp_path):
    job = submit(cluster, *settings(corpus, tmp_path / "run"), "--data.train", "[nowhere/corpus]")
    assert job.wait_for_end() == "FAILED"
    assert job.exit_code == 3, job.text
    assert job.text.count("nowhere/corpus: no such corpus") == 1
    assert "nothing was started" in job.text
    assert "rendezvous" not in job.text


@pytest.mark.slow
def test_a_limit_shorter_than_the_warning_is_said_and_not_requeued(cluster, corpus, tmp_path):
    options = ["--nodes=2", "--time=1", "launch/train.sbatch"]
    job = cluster.submit(*options, *settings(corpus, tmp_path / "run"))
    assert job.wait_for_end() == "FAILED"
    assert (job.exit_code, job.restarts) == (85, 0), job.text
    assert "not requeued" in job.text
    assert "--signal=B:USR1@SECONDS" in job.text


@pytest.mark.slow
def test_a_run_folder_that_became_read_only_ends_with_4(cluster, corpus, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, *settings(corpus, run))
    wait_for_steps(job, run)
    # Over the folder, because one with open files cannot be made read-only.
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", run]
    if subprocess.run(mount, capture_output=True).returncode:
        cluster.call("scancel", job.number)
        pytest.skip("needs the right to mount a file system")
    try:
        job.warn()
        assert job.wait_for_end() == "FAILED"
        assert job.exit_code == 4, job.text
        assert "asking the processes to stop by a signal" in job.text
        assert "failed with exit code 4; not requeued" in job.text
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)
