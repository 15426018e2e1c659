"""How a run ends: status.json records every outcome, and each sink gets a failure."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_slm.config.schema import Config
from megatron_slm.files.redact import redacted
from megatron_slm.monitoring import run_status
from megatron_slm.monitoring.sinks import append_warning
from megatron_slm.parallel import Groups
from megatron_slm.training import resume
from megatron_slm.training.data_fault import DataFault
from megatron_slm.training.preflight import PreflightFailed

if TYPE_CHECKING:
    from megatron_slm.training.loop import TrainingRun

EXIT_BAD_DATA = 3
EXIT_TRAINING_FAILED = 4
EXIT_UNEXPECTED = 1
"""Python's own, after a traceback."""


class TrainingFailed(RuntimeError):
    """Training cannot go on; every rank of the job raises this at the same step."""


class NonFiniteLoss(TrainingFailed):
    """Training diverged; the last checkpoint is the last good state."""


class NotSaved(TrainingFailed):
    """The run reached its end or was asked to stop, and the checkpoint of its last step could not
    be written.
    """


def train_to_an_end(config: Config, groups: Groups, make_run: Callable[[], TrainingRun]) -> int:
    """Make a run, train it, and report how it ended; returns the exit code.

    An exception that is neither bad data nor a failure of training is reported and then raised
    again, for its traceback.
    """
    folder = config.run.folder
    if groups.world_rank == 0:
        run_status.begin(folder, resume.planned_length(config).steps)
    if groups.world_size > 1:
        torch.distributed.barrier()  # a rank that fails at once finds the status of this start
    run: TrainingRun | None = None
    try:
        run = make_run()
        run.start()
        if groups.world_rank == 0:
            run_status.progress(folder, run.step)
        exit_code = run.run()
    except BaseException as error:
        exit_code = _exit_code_of(error)
        if exit_code == 0:
            raise
        _report_failure(error, exit_code, config, groups, run)
        if not isinstance(error, (TrainingFailed, ValueError)):
            raise
        return exit_code
    state = "stopped" if exit_code else "done"
    reason = f"trained to its last step, {run.steps}"
    if exit_code:
        reason = f"stopped on request after step {run.step} of {run.steps}"
    if groups.world_rank == 0:
        run_status.end(folder, state, reason, step=run.step, exit_code=exit_code)
    run.reporter.close(state, exit_code)
    return exit_code


def _exit_code_of(error: BaseException) -> int:
    if isinstance(error, TrainingFailed):
        return EXIT_TRAINING_FAILED
    if isinstance(error, PreflightFailed):
        return error.exit_code
    if isinstance(error, ValueError):
        return EXIT_BAD_DATA
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return EXIT_UNEXPECTED


def _report_failure(
    error: BaseException,
    exit_code: int,
    config: Config,
    groups: Groups,
    run: TrainingRun | None,
) -> None:
    """Report a failure in status.json, on standard error, and to the sinks where this rank has
    them, else in the file of warnings.

    A rank that fails alone breaks the others' connections, and they fail in turn. The rank with the
    sinks then reports the reason that the first rank left in status.json. (If the launcher ends
    that rank before it can, the reason is in status.json and warnings.jsonl.)
    """
    together = isinstance(error, (TrainingFailed, DataFault, PreflightFailed))
    if together and not groups.is_logger:
        return
    sentence = _describe(error)
    if not together and groups.world_size > 1:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            sentence = (
                f"lost another process of the job, which was killed or failed first ({sentence})"
            )
        sentence = f"process {groups.world_rank} on {socket.gethostname()} failed: {sentence}"
    step = run.step if run is not None else 0
    status = run_status.end(config.run.folder, "failed", sentence, step=step, exit_code=exit_code)
    first = status.reason if status is not None and status.state == "failed" else sentence
    if first == sentence or not first.endswith(_describe(error)):  # else another rank has said it
        print(f"train: {sentence}", file=sys.stderr, flush=True)
    reporter = getattr(run, "reporter", None)  # start() makes it
    if reporter is not None and groups.is_logger:
        reporter.message(first, "error")
        reporter.close("failed", exit_code)
    elif first == sentence:
        with contextlib.suppress(OSError):  # a full disk, perhaps the very reason
            append_warning(Path(config.run.folder) / "warnings.jsonl", step, "error", sentence)


def _describe(error: BaseException) -> str:
    if isinstance(error, (TrainingFailed, ValueError)):
        return redacted(str(error))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted from the keyboard"
    first_line = next(iter(str(error).splitlines()), "")
    return redacted(f"{type(error).__name__}: {first_line}")
