"""Train a model, plainly (CLM) or on selected tokens (SLM).

    python -m megatron_slm.train --config launch/recipes/quickstart.yaml               one process
    torchrun --nproc-per-node 2 -m megatron_slm.train --config RECIPE.yaml --parallel.tensor 2 \\
        --selection.keep_fraction 0.6
    torchrun --nproc-per-node 2 -m megatron_slm.train --config RECIPE.yaml --preflight
                                                          look at the job, do not train

A run folder that holds a checkpoint is resumed. Exit codes: 0 done, 2 bad configuration, 3 bad
data, 4 training diverged, or the checkpoint it ended or stopped with could not be saved, 85 stopped
on request with a checkpoint (start the same command again), 86 hung.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.checkpoint.architecture import take_architecture
from megatron_slm.config.arguments import take_switch
from megatron_slm.config.check import check_config
from megatron_slm.config.load import CHECK_ONLY, parse_config
from megatron_slm.config.schema import Config
from megatron_slm.files.folder_lock import FolderLock
from megatron_slm.installation import require, says_missing_extra
from megatron_slm.training import preflight, preflight_files, preflight_page, setup
from megatron_slm.training.outside_parts import OutsideParts, load_outside_parts
from megatron_slm.training.stop_signals import STOP_FILE, StopSignals

if TYPE_CHECKING:
    from megatron_slm.device import Device


@says_missing_extra("train")
def main(argv: list[str] | None = None) -> int:
    """Check everything that can be checked alone, then join the job and train; the exit code.

    Requests to stop are handled from the first line on.
    """
    with (
        contextlib.ExitStack() as held,
        StopSignals("stopping with a checkpoint within a few steps") as signals,
    ):
        return _main(argv, held, signals)


@dataclass(frozen=True)
class _Prepared:
    """What a process has prepared before it joins the others."""

    config: Config
    world_size: int
    parts: OutsideParts
    run_inputs: setup.RunInputs | None
    """Opened by rank 0 alone."""
    found: list[preflight.Finding]
    """What the preflight of rank 0 has found so far."""
    thorough: bool
    """Only the preflight was requested."""


def _main(argv: list[str] | None, held: contextlib.ExitStack, signals: StopSignals) -> int:
    rank = int(os.environ.get("RANK", 0))
    argv, check_only = take_switch(argv, CHECK_ONLY)
    argv, only_look = take_switch(argv, "--preflight")
    try:
        prepared = _prepare(argv, held, rank, thorough=only_look)
        if check_only or not only_look:
            preflight.raise_if_fatal(prepared.found)
        require("torch", "megatron")
        if check_only:
            _forget_stop_request(prepared.config.run.folder)
            print(prepared.config.run.folder)
            return 0
        device = _choose_device(prepared)
    except ValueError as error:
        if rank == 0:
            print(f"train: {error}", file=sys.stderr)
        if isinstance(error, preflight.PreflightFailed):
            return error.exit_code
        return 3 if isinstance(error, setup.RunInputError) else 2
    return _join_and_train(prepared, device, signals)


def _prepare(
    argv: list[str], held: contextlib.ExitStack, rank: int, *, thorough: bool
) -> _Prepared:
    """Read and check the settings, and on rank 0 everything they name.

    ValueError lists what is wrong. Rank 0 looks first, so that a changed corpus is hashed once and
    a problem is printed once, and before torch is imported, so that a missing file is named at
    once.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    config = parse_config(argv, "slm-train", __doc__, fill=take_architecture)
    check_config(config, world_size)
    parts = load_outside_parts(config)
    if rank:
        return _Prepared(config, world_size, parts, None, [], thorough)
    _keep_others_out(config.run.folder, held)
    run_inputs = setup.open_run_inputs(config, world_size)
    found = preflight_files.check_files(config, run_inputs, world_size, thorough=thorough)
    return _Prepared(config, world_size, parts, run_inputs, found, thorough)


def _choose_device(prepared: _Prepared) -> "Device":
    """The device of this process, and what has to be decided before anything uses it."""
    from megatron_slm.device import choose_device, set_threads

    config = prepared.config
    device = choose_device(config.device.kind)  # before anything imports megatron.core
    set_threads(config.device.threads_per_process)
    if device.kind == "cuda":
        from megatron_slm.training.flight_recorder import record_collectives

        record_collectives(config.device.flight_recorder_entries, config.run.folder)
    if prepared.parts.make_optimizer is not None:
        from megatron_slm.model.outside_optimizer import check_outside_optimizer

        check_outside_optimizer(
            config.optimizer.kind, prepared.parts.make_optimizer, config.optimizer
        )
    return device


def _join_and_train(prepared: _Prepared, device: "Device", signals: StopSignals) -> int:
    from megatron_slm.parallel import join_job, leave_job
    from megatron_slm.training import ending, loop, preflight_job

    config = prepared.config
    groups = join_job(
        config.parallel, device, config.run.seed, timeout_minutes=config.device.timeout_minutes
    )

    def look_at_job() -> list[preflight.Finding]:
        return preflight_job.check_job(
            config, groups, prepared.run_inputs, prepared.found, thorough=prepared.thorough
        )

    def make_run() -> loop.TrainingRun:
        findings = look_at_job()
        preflight.raise_if_fatal(findings)
        opened = prepared.run_inputs or setup.open_run_inputs(config, prepared.world_size)
        notes = preflight.warning_messages(findings)
        return loop.TrainingRun(config, groups, opened, signals, notes, prepared.parts)

    try:
        if prepared.thorough:
            return preflight_page.report(look_at_job(), groups.world_rank)
        return ending.train_to_an_end(config, groups, make_run)
    finally:
        leave_job()


def _keep_others_out(run_folder: str, held: contextlib.ExitStack) -> None:
    """Lock the run folder until `held` is left.

    Two runs in one folder would write over each other's metrics and checkpoints.
    """
    advice = (
        "Let it end, ask it to stop with a checkpoint "
        f"(touch {os.path.join(run_folder, STOP_FILE)}), or give this run another run.folder"
    )
    try:
        held.enter_context(FolderLock(run_folder, "a training run", advice))
    except OSError as error:
        raise ValueError(
            f"run.folder {run_folder}: cannot be written ({error.strerror}); give another, or make "
            "it writable"
        ) from None


def _forget_stop_request(run_folder: str) -> None:
    """Remove the stop file of a run that was killed before it could stop.

    Only while the folder is locked, or it could be the request to a run that lives. The scripts of
    launch/ have this done by the check that comes first, because from then on they write the file
    themselves, also before the trainer is there to read it.
    """
    Path(run_folder, STOP_FILE).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
