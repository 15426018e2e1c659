"""launch/train.sbatch on a real SLURM of two nodes: rendezvous over srun and torchrun, stop near the limit, requeue, resume, done.

The trainer is a stand-in of thirty lines that keeps the real one's contract (gloo over torchrun's environment, stop file, exit code 85,
`latest`), so that what is tested is the launching.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

TRAINER = """
import os, sys, time
from pathlib import Path
folder = Path(os.environ["RUN_FOLDER"])
if "--print_run_folder" in sys.argv:
    print(folder)
    sys.exit(0)
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, latest = dist.get_rank(), folder / "checkpoints" / "latest"
step = int(latest.read_text()) if latest.exists() else 0
print(f"rank {rank} of {dist.get_world_size()} on {os.environ['SLURMD_NODENAME']} starts at step {step}", flush=True)
def save():
    if rank == 0:
        latest.parent.mkdir(exist_ok=True)
        latest.write_text(str(step))
while step < 6:
    time.sleep(0.5)
    step += 1
    # The first start never gets past step 3 by itself: it waits to be stopped there.
    while step == 3 and not latest.exists() and not (folder / "stop_requested").exists():
        (folder / "waiting").touch()
        time.sleep(0.1)
    asked = torch.tensor(int(rank == 0 and (folder / "stop_requested").exists()))
    dist.all_reduce(asked)
    if asked:
        save()
        dist.barrier()
        if rank == 0:
            (folder / "stop_requested").unlink()
        sys.exit(85)
save()
dist.destroy_process_group()
print(f"rank {rank} done", flush=True)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "megatron_slm").mkdir()
    (tmp_path / "megatron_slm" / "__init__.py").touch()
    (tmp_path / "megatron_slm" / "train.py").write_text(TRAINER)
    return tmp_path


def state(job: str, environment: dict) -> dict[str, str]:
    shown = subprocess.run(
        ["scontrol", "show", "job", job],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def test_a_job_is_stopped_requeued_resumed_and_done(slurm, checkout):
    run_folder = checkout / "run"
    environment = {
        **slurm,
        "RUN_FOLDER": str(run_folder),
        "SLM_VENV": "/nonexistent",
        "SLM_PROCESSES_PER_NODE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    # Both nodes of this cluster are this machine, so the first node's name must lead here.
    (checkout / "env.sh").write_text(
        'source "$SLM_ROOT/launch/env.sh"\nscontrol() { if [ "$1" = show ]; then echo 127.0.0.1; else command scontrol "$@"; fi; }\n'
    )
    environment["SLM_ENV"] = str(checkout / "env.sh")
    submitted = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--time=10",
            "--output=job.log",
            "launch/train.sbatch",
            "--config",
            "x.yaml",
        ],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert submitted.returncode == 0, submitted.stderr
    job, log = submitted.stdout.strip(), checkout / "job.log"

    def wait_for(condition, what: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            text = log.read_text() if log.exists() else "no output"
            assert time.monotonic() < deadline, (
                f"{what} did not happen; {state(job, environment)}\n{text}"
            )
            time.sleep(0.5)

    wait_for((run_folder / "waiting").exists, "step 3")
    # What --signal=B:USR1@300 does near the time limit: the signal goes to the batch script alone.
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], env=environment, check=True)
    wait_for(lambda: state(job, environment).get("Restarts") == "1", "the requeue")
    assert (run_folder / "checkpoints" / "latest").read_text() == "3"
    wait_for(
        lambda: state(job, environment)["JobState"] in ("COMPLETED", "FAILED"),
        "the second start's end",
    )

    text = log.read_text()
    assert state(job, environment)["JobState"] == "COMPLETED", text
    assert state(job, environment)["ExitCode"] == "0:0"
    for start in (0, 3):
        ranks = re.findall(rf"rank (\d) of 4 on (n\d) starts at step {start}", text)
        assert sorted(ranks) == [("0", "n1"), ("1", "n1"), ("2", "n2"), ("3", "n2")], text
    assert len(re.findall(r"rank \d done", text)) == 4
    assert "requeueing job" in text and (run_folder / "checkpoints" / "latest").read_text() == "6"
