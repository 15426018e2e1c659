"""A real SLURM cluster of two nodes on this machine, on loopback: munged, slurmctld and two slurmd in a temporary folder."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def configuration(folder: Path) -> str:
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN"
        for name in ("n1", "n2")
    )
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
KillWait=10
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment in which srun, sbatch and scontrol talk to the cluster."""
    missing = [program for program in PROGRAMS if find(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs {', '.join(missing)} (Debian: slurmd slurmctld slurm-client munge)"
            if missing
            else "needs root, to start the daemons"
        )
    folder = Path(tmp_path_factory.mktemp("slurm"))
    folder.chmod(0o755)
    for parent in list(folder.parents)[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(configuration(folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [
        start(
            [
                find("munged"),
                "--foreground",
                "--force",
                f"--socket={folder}/munge.socket",
                f"--key-file={folder}/munge.key",
                f"--pid-file={folder}/munge.pid",
                f"--log-file={folder}/munge.log",
                f"--seed-file={folder}/munge.seed",
            ],
            environment,
            folder,
            "munged",
        )
    ]
    wait_until(lambda: (folder / "munge.socket").exists(), 20, "munged did not start")
    daemons.append(start([find("slurmctld"), "-D", "-i"], environment, folder, "slurmctld"))
    daemons += [
        start([find("slurmd"), "-D", "-N", node], environment, folder, node)
        for node in ("n1", "n2")
    ]
    try:
        ready = ["srun", "--nodes=2", "--ntasks=2", "--immediate=5", "true"]
        wait_until(
            lambda: subprocess.run(ready, env=environment, capture_output=True).returncode == 0,
            60,
            "the cluster did not come up: " + str(folder),
        )
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()


def start(command: list[str], environment: dict, folder: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment, stdout=open(folder / f"{name}.out", "w"), stderr=subprocess.STDOUT
    )


def wait_until(condition, seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.5)
