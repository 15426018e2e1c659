"""status.json of a run folder: whether the run is running, done, stopped or failed, and why.

Nothing here imports torch.

It is replaced whole at every log line and when the run ends, so a reader never sees half of it. A
process that is killed cannot write: the file then still says "running", and `RunStatus.was_killed`
detects this on the machine of the run.
"""

import contextlib
import datetime
import json
import os
import socket
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.files.folder_lock import process_began

STATUS_FILE = "status.json"
STATES = ("running", "done", "stopped", "failed")


@dataclass(frozen=True)
class RunStatus:
    """What is known of the newest start of a run."""

    state: str
    """running, done (the last step is trained and saved), stopped (on request, to be continued),
    failed.
    """
    reason: str
    """A sentence; empty while the run is running."""
    step: int
    """The last step that was logged, or with which the run ended."""
    steps: int
    """Steps of the whole run."""
    exit_code: int | None
    """What the program ended with; None while it runs."""
    started_at: str
    """When this start of the run began: UTC, ISO 8601. A resumed run has a later one than its first
    start.
    """
    updated_at: str
    """When this was written: UTC, ISO 8601."""
    host: str
    pid: int
    """Host name and process id of rank 0."""

    @property
    def was_killed(self) -> bool:
        """Whether the run was killed: "running", but no such process exists on this host."""
        here = self.host == socket.gethostname()
        return self.state == "running" and here and not process_began(self.pid)


def read_status(run_folder: str | Path) -> RunStatus | None:
    """The status of a run folder; None where it has none (an older run) or none that is whole."""
    try:
        content = json.loads((Path(run_folder) / STATUS_FILE).read_text(encoding="utf-8"))
        status = RunStatus(**{each.name: content[each.name] for each in fields(RunStatus)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status if status.state in STATES else None


def begin(run_folder: str | Path, steps: int) -> None:
    """A run starts, or starts again: called by rank 0, whose host and process id it notes."""
    now = _now()
    host = socket.gethostname()
    status = RunStatus("running", "", 0, steps, None, now, now, host, os.getpid())
    _write(run_folder, status)


def progress(run_folder: str | Path, step: int) -> None:
    """The run came to `step`. What another rank wrote of its failure stays."""
    _change(run_folder, "running", step=step)


def end(
    run_folder: str | Path, state: str, reason: str, *, step: int, exit_code: int
) -> RunStatus | None:
    """The run ended; returns what the file says then, None where it cannot be read or written.

    The first reason of a failure stays, because a failing rank takes the others with it.
    """
    return _change(run_folder, state, reason=reason, step=step, exit_code=exit_code)


def _change(run_folder: str | Path, state: str, **changes) -> RunStatus | None:
    status = read_status(run_folder)
    if status is not None and status.state == "running":
        status = replace(status, state=state, updated_at=_now(), **changes)
        _write(run_folder, status)
    return status


def _write(run_folder: str | Path, status: RunStatus) -> None:
    """Storage that fails must not end a run: the status then stays as it was, and metrics.jsonl
    reports the storage.
    """
    with contextlib.suppress(OSError):
        write_json_atomically(Path(run_folder) / STATUS_FILE, asdict(status))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
