"""One start of a run of two processes for tests/soak.py: its processes, their memory, and what is
left when it is over.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.end_to_end.small_run import ROOT

MARK = "SLM_TEST_SOAK"
"""Every process of a soak has its folder in this environment variable, forked and orphaned ones
too.
"""
RANKS = (0, 1)
PATIENCE_SECONDS = 300
SHARED_MEMORY = Path("/dev/shm")


class SoakFailed(Exception):
    """A fault did what it must not do."""


def processes_of(folder: Path) -> dict[int, dict[str, str]]:
    """Living processes of the soak in `folder`, with their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile, or is somebody else's
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if environment.get(MARK) == str(folder):
                    found[int(entry.name)] = environment
    return found


def parent_of(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def listening_sockets() -> set[str]:
    """Inodes of the TCP sockets of this machine that listen."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            found |= {row[9] for row in rows if row[3] == "0A"}
    return found


def links_of(pid: int) -> set[str]:
    """What the open files of a process are."""
    found = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(entry))
    return found


def unused_shared_memory() -> set[str]:
    """Shared memory that no living process has: files of /dev/shm, and System V segments with
    nobody attached.
    """
    used = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            used |= links_of(int(entry.name))
            with suppress(OSError):
                used |= {line.split()[-1] for line in (entry / "maps").read_text().splitlines()}
    found = {str(path) for path in SHARED_MEMORY.iterdir() if str(path) not in used}
    with suppress(OSError):
        rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        found |= {f"System V segment {row[1]}" for row in rows if row[6] == "0"}
    return found


class Job:
    """launch/processes.py with two trainers.

    memory_kib: what each trainer had resident, from its first finished steps on, twice a second
    while somebody waits here.
    """

    def __init__(self, folder: Path, run: Path, arguments: list[str], environment: dict[str, str]):
        self.folder = folder
        self.run = run
        self.said: list[str] = []
        self.memory_kib: dict[int, list[int]] = {rank: [] for rank in RANKS}
        self.sockets: set[str] = set()
        launcher = [str(ROOT / "launch" / "processes.py"), "--standalone", "--nproc-per-node=2"]
        self.launcher = subprocess.Popen(
            [sys.executable, *launcher, *arguments[1:]],
            cwd=ROOT,
            env=environment | {MARK: str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._trainers: dict[int, int] = {}
        self._sampled_at = 0.0

    def _read(self) -> None:
        for line in self.launcher.stdout:
            self.said.append(line)

    @property
    def output(self) -> str:
        return "".join(self.said)

    def trainers(self) -> dict[int, int]:
        """rank -> process id; {} before both are there."""
        if len(self._trainers) < len(RANKS):
            self._trainers = {
                int(environment["RANK"]): pid
                for pid, environment in processes_of(self.folder).items()
                if "RANK" in environment and parent_of(pid) == self.launcher.pid
            }
        return self._trainers if len(self._trainers) == len(RANKS) else {}

    def step(self) -> int:
        """The last step that every rank of this start has finished, as far as they have written;
        0 = none yet.
        """
        steps = []
        for rank, pid in self.trainers().items():
            path = self.run / "ranks" / f"rank_{rank:05d}.json"
            with suppress(OSError, ValueError):
                found = json.loads(path.read_text())
                steps += [found["step"]] if found["pid"] == pid else []
        return min(steps) if len(steps) == len(RANKS) else 0

    def look(self) -> None:
        """Note the memory of the trainers and the ports of all processes of this start."""
        if time.monotonic() - self._sampled_at < 0.5 or not self.step():
            return
        self._sampled_at = time.monotonic()
        for rank, pid in self.trainers().items():
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                resident = next(line for line in lines if line.startswith("VmRSS"))
                self.memory_kib[rank].append(int(resident.split()[1]))
        if not self.sockets:
            ours = set().union(*(links_of(pid) for pid in processes_of(self.folder)))
            self.sockets = {each for each in listening_sockets() if f"socket:[{each}]" in ours}

    def train_for(self, steps: int, seconds: float) -> int:
        """Wait until `steps` steps of this start are finished and `seconds` have passed since the
        first; the step.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        first = 0
        since = 0.0
        while time.monotonic() < deadline:
            self.look()
            step = self.step()
            if step and not first:
                first = step
                since = time.monotonic()
            if first and step >= first + steps and time.monotonic() - since >= seconds:
                return step
            if self.launcher.poll() is not None:
                raise SoakFailed(f"it ended by itself with {self.launcher.returncode}")
            time.sleep(0.1)
        raise SoakFailed(f"no {steps} steps within {PATIENCE_SECONDS} s")

    def wait_for_words(self, words: str) -> None:
        """Wait until the words are said, or the start is over."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while words not in self.output and self.launcher.poll() is None:
            if time.monotonic() > deadline:
                raise SoakFailed(f"{words!r} was not said within {PATIENCE_SECONDS} s")
            time.sleep(0.05)

    def wait(self, patience_seconds: float = PATIENCE_SECONDS) -> int:
        """Until the launcher and every process of this start is gone; the exit code (negative:
        killed by that signal).
        """
        deadline = time.monotonic() + patience_seconds
        while self.launcher.poll() is None or processes_of(self.folder):
            if time.monotonic() > deadline:
                left = sorted(processes_of(self.folder))
                raise SoakFailed(f"not over after {patience_seconds} s: processes {left}")
            self.look()
            time.sleep(0.1)
        self._reader.join(timeout=10)
        return self.launcher.returncode

    def kill(self) -> None:
        """Whatever became of it."""
        alive = [self.launcher.pid] if self.launcher.poll() is None else []
        for pid in [*alive, *processes_of(self.folder)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
