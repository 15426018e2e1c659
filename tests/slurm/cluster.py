"""A real SLURM cluster of several nodes on this machine, on loopback.

munged, slurmctld and one slurmd per node keep everything in one folder.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str:
    """Why no cluster can be started here; "" when one can."""
    missing = [program for program in PROGRAMS if find(program) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurmd slurmctld slurm-client munge)"
    return "" if os.geteuid() == 0 else "needs root, to start the daemons"


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are found, so that they differ."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def configuration(folder: Path, nodes: tuple[str, ...]) -> str:
    host = socket.gethostname().split(".")[0]
    controller, *ports = free_ports(1 + len(nodes))
    node_lines = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
        "RealMemory=64000 State=UNKNOWN"
        for name, port in zip(nodes, ports, strict=True)
    )
    return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
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
KillWait=15
SlurmdTimeout=20
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
{node_lines}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


class Cluster:
    """The daemons, and what tests ask of them. A context manager.

    `environment` is what srun and sbatch need to find them.
    """

    def __init__(self, folder: Path, nodes: tuple[str, ...] = ("n1", "n2", "n3")):
        self.folder = folder
        self.nodes = nodes
        self.daemons: list[subprocess.Popen] = []
        self.node_daemons: dict[str, subprocess.Popen] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SLM_ROOT": str(ROOT),
            "SLM_VENV": "/nonexistent",
            "SLM_PROCESSES_PER_NODE": "1",
            "SLM_MASTER_ADDRESS": "127.0.0.1",  # no name server knows the nodes' names
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def __enter__(self) -> "Cluster":
        folder = self.folder
        folder.chmod(0o755)
        for parent in list(folder.parents)[:2]:
            parent.chmod(parent.stat().st_mode | 0o011)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(configuration(folder, self.nodes))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        munge = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{name}={folder}/{file}" for name, file in munge.items()]
        try:
            self.start("munged", "--foreground", "--force", *options)
            wait_until((folder / "munge.socket").exists, 30, lambda: "munged did not start")
            self.start("slurmctld", "-D", "-i")
            for node in self.nodes:
                self.start_node(node)
            wait_until(self.is_up, 90, lambda: f"the cluster did not come up: {folder}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.call("scancel", "--user=root", check=False)
        self.call("scancel", "--signal=KILL", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def start_node(self, node: str) -> None:
        self.node_daemons[node] = self.start("slurmd", "-D", "-N", node)

    def crash(self, node: str) -> None:
        """All of the node ends in one instant: its daemon, those of its steps, their tasks."""
        self.node_daemons[node].kill()
        for pid in self.processes_of_node(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.node_daemons[node].wait()

    def processes_of_node(self, node: str) -> list[int]:
        """Daemons of the steps on a node, then their tasks with all that these started.

        Of this cluster alone: another one on the machine has nodes of the same names.
        """
        marks = [f"SLURMD_NODENAME={node}\0", f"SLURM_CONF={self.environment['SLURM_CONF']}\0"]
        parents = {}
        tasks = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended in the meantime
                if entry.name.isdigit():
                    parents[int(entry.name)] = int(
                        (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    )
                    environment = (entry / "environ").read_bytes()
                    if all(mark.encode() in environment for mark in marks):
                        tasks.append(int(entry.name))
        above = {parents[pid] for pid in tasks} - set(tasks)
        steps = [pid for pid in above if pid != 1 and _name(pid) == "slurmstepd"]
        return steps + tasks

    def start(self, program: str, *options: str) -> subprocess.Popen:
        with open(self.folder / f"{program}.{len(self.daemons)}.out", "w") as output:
            self.daemons.append(
                subprocess.Popen(
                    [find(program), *options],
                    env=self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_take_signals,
                )
            )
        return self.daemons[-1]

    def is_up(self) -> bool:
        count = str(len(self.nodes))
        probe = self.call("srun", f"--nodes={count}", f"--ntasks={count}", "true", check=False)
        return probe.returncode == 0

    def call(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    def submit(self, *words: str | Path, **environment: str) -> "Job":
        """sbatch with these options, script and arguments; its log is in the cluster's folder."""
        log = self.folder / f"job.{len(list(self.folder.glob('job.*')))}.log"
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={log}", *map(str, words)],
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), log)


class Job:
    """A submitted job. Every wait that fails shows SLURM's record of the job and its log."""

    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster = cluster
        self.number = number
        self.log = log

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "no output"

    @property
    def record(self) -> dict[str, str]:
        shown = self.cluster.call("scontrol", "show", "job", self.number).stdout
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    @property
    def state(self) -> str:
        return self.record["JobState"]

    @property
    def exit_code(self) -> int:
        return int(self.record["ExitCode"].split(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.record["Restarts"])

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 240) -> None:
        wait_until(condition, seconds, lambda: f"{what} did not happen; {self.record}\n{self.text}")

    def wait_for_end(self, seconds: float = 240) -> str:
        """The state it ended with."""
        self.wait_for(lambda: self.state in ENDED, "the end of the job", seconds)
        return self.state

    def warn(self) -> None:
        """What --signal=B:USR1@300 does near the limit: a signal to the batch script alone."""
        self.cluster.call("scancel", "--signal=USR1", "--batch", self.number)

    def processes(self, module: str) -> list[int]:
        """The processes of the job that run `python -m MODULE` themselves, not their launchers."""
        found = []
        number = self.record["JobId"]
        for entry in Path("/proc").iterdir():
            try:
                words = (
                    (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                )
                mine = f"SLURM_JOB_ID={number}\0".encode()
                if (
                    module.encode() in words
                    and b"processes.py" not in b" ".join(words)
                    and mine in (entry / "environ").read_bytes()
                ):
                    found.append(int(entry.name))
            except OSError:  # it ended in the meantime
                continue
        return sorted(found)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _take_signals() -> None:
    """Under nohup or in the background of a shell some are ignored, which jobs would inherit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def wait_until(condition: Callable[[], object], seconds: float, message: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.2)
