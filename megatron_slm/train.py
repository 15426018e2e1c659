"""Train a model, plainly (CLM) or on selected tokens (SLM).

    python -m megatron_slm.train --config launch/recipes/quickstart.yaml                     one process
    torchrun --nproc-per-node 2 -m megatron_slm.train --config RECIPE.yaml --parallel.tensor 2 --selection.keep_fraction 0.6
    torchrun --nproc-per-node 2 -m megatron_slm.train --config RECIPE.yaml --preflight                look at the job, do not train

A run folder that holds a checkpoint is resumed. Exit codes: 0 done, 2 bad configuration, 3 bad
data, 4 training diverged, or the checkpoint it ended or stopped with could not be saved, 85 stopped
on request with a checkpoint (start the same command again), 86 hung.
"""

import contextlib
import os
import sys
from pathlib import Path

from megatron_slm.checkpoint.architecture import take_architecture
from megatron_slm.config.arguments import take_switch
from megatron_slm.config.check import check_config
from megatron_slm.config.load import CHECK_ONLY, parse_config
from megatron_slm.files.folder_lock import FolderLock
from megatron_slm.training import preflight, preflight_files, preflight_page, setup
from megatron_slm.training.stop_signals import STOP_FILE, StopSignals


def main(argv: list[str] | None = None) -> int:
    """Parse, check everything that can be checked alone, then join the job and train; returns the
    exit code.

    Requests to stop are heard from the first line on.
    """
    with (
        contextlib.ExitStack() as held,
        StopSignals("stopping with a checkpoint after this step") as signals,
    ):
        return _main(argv, held, signals)


def _main(argv: list[str] | None, held: contextlib.ExitStack, signals: StopSignals) -> int:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    argv, check_only = take_switch(argv, CHECK_ONLY)
    argv, only_look = take_switch(argv, "--preflight")
    try:
        config = parse_config(argv, "slm-train", __doc__, fill=take_architecture)
        check_config(config, world_size)
        if rank == 0:
            _keep_others_out(config.run.folder, held)
        # Rank 0 looks first, so that a changed corpus is hashed once and a problem is printed once,
        # and before torch is imported, so that a missing file is named at once.
        run_inputs = setup.open_run_inputs(config, world_size) if rank == 0 else None
        found = []
        if run_inputs is not None:
            found = preflight_files.check_files(config, run_inputs, world_size, thorough=only_look)
        if check_only or not only_look:
            preflight.raise_if_fatal(found)
        if check_only:
            _forget_stop_request(config.run.folder)
            print(config.run.folder)
            return 0
        from megatron_slm.device import choose_device, set_threads

        device = choose_device(config.device.kind)  # before anything imports megatron.core
        from megatron_slm.parallel import join_job, leave_job
        from megatron_slm.training import ending, loop, preflight_job
    except ValueError as error:
        if rank == 0:
            print(f"train: {error}", file=sys.stderr)
        if isinstance(error, preflight.PreflightFailed):
            return error.exit_code
        return 3 if isinstance(error, setup.RunInputError) else 2
    set_threads(config.device.threads_per_process)
    groups = join_job(
        config.parallel, device, config.run.seed, timeout_minutes=config.device.timeout_minutes
    )

    def look() -> list[preflight.Finding]:
        return preflight_job.check_job(config, groups, run_inputs, found, thorough=only_look)

    def make_run() -> loop.TrainingRun:
        findings = look()
        preflight.raise_if_fatal(findings)
        opened = run_inputs or setup.open_run_inputs(config, world_size)
        return loop.TrainingRun(
            config, groups, opened, signals, preflight.warning_messages(findings)
        )

    try:
        if only_look:
            return preflight_page.report(look(), rank)
        return ending.train_to_an_end(config, groups, make_run)
    finally:
        leave_job()


def _keep_others_out(run_folder: str, held: contextlib.ExitStack) -> None:
    """Lock the run folder until `held` is left: two runs in one would write over each other's
    metrics and checkpoints.
    """
    advice = (
        f"Let it end, ask it to stop with a checkpoint (touch {os.path.join(run_folder, STOP_FILE)}), "
        "or give this run another run.folder"
    )
    try:
        held.enter_context(FolderLock(run_folder, "a training run", advice))
    except OSError as error:
        raise ValueError(
            f"run.folder {run_folder}: cannot be written ({error.strerror}); give another, or make it writable"
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
