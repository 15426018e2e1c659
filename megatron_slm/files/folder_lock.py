"""One writer per folder: a second process is refused with a message that names the first; the lock
of a dead process is taken over.

FOLDER/lock names its owner as JSON, for people and for the next process. Three things show whether
the owner still writes:

  the kernel's lock  (flock) Released by the kernel when the owner dies. NFS passes it on to other
                     machines; some mounts of Lustre keep it on one machine, and others refuse it.
                     So it is believed on one machine only.
  the process        On the owner's machine: its process id, with the time at which that process
                     began, because process ids are used again.
  the beat           From another machine: the owner touches the file every BEAT_SECONDS. A lock
                     that is not touched for SILENCE_SECONDS while another process watches has
                     no owner: its machine was switched off, or its job was killed and queued again
                     elsewhere. Watching needs no agreement between clocks.

Where a mount has no locks at all, two processes that find a dead owner's lock in the same instant
on two machines may both take it; every other case is decided by what the file says.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK_FILE = "lock"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 90.0
_BEING_WRITTEN_SECONDS = 2.0
_TAKEN_OVER = 4
"""Exit code of a process that finds its folder in another's hands: it was frozen for longer than
SILENCE_SECONDS.
"""


class FolderInUse(ValueError):
    """Another process writes to the folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    pid: int
    started_at: str
    """When the lock was taken: UTC, ISO 8601."""
    machine: str
    """The running kernel and the namespace of its process ids, within which `pid` means something;
    "" where unknown.
    """
    process_began: str
    """When the kernel started the process, in its own ticks."""

    @classmethod
    def this_process(cls) -> Owner:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, now, _this_machine(), process_began(pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started_at}"

    @property
    def is_on_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == _this_machine()

    @property
    def process_lives(self) -> bool:
        """Whether the process exists; only meaningful on its machine."""
        began = process_began(self.pid)
        return bool(began) and began == self.process_began


class FolderLock:
    """Holds FOLDER/lock from `acquire` to `release`; a context manager. Makes the folder where
    there is none.

    `what` names the work for the message of a refused second process ("a training run"), `advice`
    says what to do about it. `report` is called with a sentence when a lock is taken over or
    watched.
    """

    def __init__(
        self,
        folder: str | Path,
        what: str,
        advice: str,
        *,
        report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
        beat_seconds: float = BEAT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self.path = Path(folder) / LOCK_FILE
        self._what = what
        self._advice = advice
        self._report = report
        self._beat_seconds = beat_seconds
        self._silence_seconds = silence_seconds
        self._released = threading.Event()
        self._descriptor = -1
        self._made_folder = False

    def acquire(self) -> None:
        """Take the lock. FolderInUse when a living process has it; OSError when the folder cannot
        be written.
        """
        while self._descriptor < 0:
            self._made_folder |= not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # its owner removed it, or the folder
                self._descriptor = self._try_once()
        self._owner_pid = os.getpid()
        self._released.clear()
        self._beating = threading.Thread(target=self._beat, name="folder lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Release the lock and remove its file, and the folder if `acquire` made it and it is
        empty.
        """
        if self._descriptor < 0 or self._owner_pid != os.getpid():  # a forked child owns nothing
            return
        self._released.set()
        self._beating.join()  # or it would touch whatever file is opened next under this descriptor
        with contextlib.suppress(OSError):  # the folder may be gone by now
            if _is_still(self._descriptor, self.path):
                self.path.unlink()
            if self._made_folder:
                self.path.parent.rmdir()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try_once(self) -> int:
        """The descriptor of the lock file with this process as its owner; -1: the file was
        replaced, try again.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        taken = False
        try:
            locked = _try_kernel_lock(descriptor)
            if not _is_still(descriptor, self.path):
                return -1
            owner = self._written_owner(descriptor, locked)
            if owner is not None:
                self._refuse_or_take_over(owner)
                if locked is False:  # what the kernel still holds for a dead owner is left behind
                    self.path.unlink()
                    return -1
            taken = self._sign(descriptor)
            return descriptor if taken else -1
        finally:
            if not taken:
                os.close(descriptor)

    def _written_owner(self, descriptor: int, locked: bool | None) -> Owner | None:
        """The owner that the file names; None = it has none. An owner that has locked and not yet
        signed is waited for.
        """
        for _ in range(20):
            owner = _read_owner(descriptor)
            if owner is not None or locked is not False:
                return owner
            time.sleep(_BEING_WRITTEN_SECONDS / 20)
        raise FolderInUse(f"{self.path.parent}: another process holds {self.path}. {self._advice}")

    def _refuse_or_take_over(self, owner: Owner) -> None:
        lives = owner.process_lives if owner.is_on_this_machine else self._beats(owner)
        if lives:
            raise FolderInUse(
                f"{self.path.parent}: {self._what} is writing here already ({owner}). "
                f"{self._advice}"
            )
        self._report(f"{self.path}: taken over from {owner}, which no longer runs")

    def _beats(self, owner: Owner) -> bool:
        """Whether the file is touched within SILENCE_SECONDS. FileNotFoundError: its owner
        released it while it was watched.
        """
        self._report(
            f"{self.path} is held by {owner}. Another machine cannot see whether that process "
            f"lives, so the lock is watched for up to {self._silence_seconds:.0f} s, and taken "
            "over if nothing touches it"
        )
        first = _touched_at(self.path)
        began = time.monotonic()
        while time.monotonic() - began < self._silence_seconds:
            time.sleep(self._beat_seconds / 10)
            if _touched_at(self.path) != first:
                return True
        return False

    def _sign(self, descriptor: int) -> bool:
        """Write this process into the file; whether the file is still the one under this name."""
        content = json.dumps(asdict(Owner.this_process()), indent=2) + "\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content.encode(), 0)
        os.fsync(descriptor)
        return _is_still(descriptor, self.path)

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            with contextlib.suppress(OSError):  # storage that fails for a while ends no run
                os.utime(self._descriptor)
                if not _is_still(self._descriptor, self.path):
                    self._lost()

    def _lost(self) -> None:
        """End at once when the file names another process: two writers would damage the folder."""
        descriptor = os.open(self.path, os.O_RDONLY)
        owner = _read_owner(descriptor)
        os.close(descriptor)
        if owner is not None and not self._released.is_set():
            self._report(
                f"{self.path.parent} was taken over by {owner}, because this process did not touch "
                f"its lock for {self._silence_seconds:.0f} s; it ends without another write"
            )
            os._exit(_TAKEN_OVER)


def process_began(pid: int) -> str:
    """When the kernel started process `pid`, in ticks since boot; "" when there is none, or it is
    dead and not yet collected.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state = fields[0]
    began = fields[19]
    return "" if state in "ZX" else began


def _this_machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _try_kernel_lock(descriptor: int) -> bool | None:
    """True: locked. False: another process has it. None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether `path` names the open file: it may have been removed, or replaced, since it was
    opened.
    """
    return os.path.samestat(os.fstat(descriptor), os.stat(path))


def _touched_at(path: Path) -> int:
    """When the file was last touched, in ns. It is opened each time, because NFS then queries the
    server.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)


def _read_owner(descriptor: int) -> Owner | None:
    """Whom the file names; None for an empty file, and for one whose writer was killed while it
    wrote.
    """
    try:
        return Owner(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):
        return None
