"""How a run that is done or stopped on request ends, and what failing saves lead to."""

from megatron_slm.training.ending import NotSaved
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.signals import EXIT_RESUME, StopRequest


def exit_code_of_end(run: RunParts, stop: StopRequest, *, stopped: bool) -> int:
    """Report how the run ended; returns its exit code.

    NotSaved: there is no checkpoint of the last step.
    """
    saved = run.store.saved_step == run.step
    if stopped and (problem := stop.clear()):
        run.reporter.message(problem, "warning")
    if stopped and saved:
        run.reporter.message(
            f"stopped on request after step {run.step} of {run.steps}; start the same command "
            "again to continue",
            "warning",
        )
    if not saved:
        reached = f"the run reached its last step {run.steps}"
        if stopped:
            reached = f"the run stopped on request after step {run.step} of {run.steps}"
        raise NotSaved(
            f"{reached}, but the checkpoint of that step could not be saved (see the errors "
            f"above); {_how_to_go_on(run)}"
        )
    return EXIT_RESUME if stopped else 0


def refuse_failing_saves(run: RunParts) -> None:
    """NotSaved when as many checkpoints in a row as the settings allow could not be saved."""
    failed = run.store.failed_saves
    if failed >= run.config.checkpoint.max_failed_saves:
        raise NotSaved(
            f"{failed} checkpoints in a row could not be saved, the last one at step {run.step} "
            f"(checkpoint.max_failed_saves); {_how_to_go_on(run)}"
        )


def _how_to_go_on(run: RunParts) -> str:
    return (
        f"free space or fix {run.store.checkpoints}, then start the same command again: it goes "
        f"on from step {run.store.saved_step or 0}"
    )
