"""Prints the state of each stage of a pipeline."""

import shlex

from megatron_slm.pipeline.checks import Assembled
from megatron_slm.pipeline.local import LocalRun
from megatron_slm.pipeline.slurm import NEVER, Queued, job_before
from megatron_slm.pipeline.state import State


def show(pipeline: Assembled, state: State, queue: dict[str, Queued]) -> None:
    """Print one line per stage: done, running, waiting, ended unfinished, or not begun."""
    rows = [
        (stage.name, *_describe_stage(pipeline, state, queue, stage)) for stage in pipeline.stages
    ]
    name_width = max(len(name) for name, _, _ in rows)
    state_width = max(len(word) for _, word, _ in rows)
    for name, word, more in rows:
        print(f"{name:{name_width}}  {word:{state_width}}  {more}".rstrip())


def _describe_stage(pipeline: Assembled, state: State, queue, stage) -> tuple[str, str]:
    standing = state.standing(stage)
    if standing.complete:
        return "done", standing.progress
    if queued := queue.get(stage.name):
        word = queued.state.lower()
        if queued.reason == NEVER:
            word = "cannot start"
        reason = f" ({queued.reason})" if queued.reason not in ("None", "") else ""
        more = [f"job {queued.job}{reason}", standing.progress]
        return word, "; ".join(filter(None, more))
    job = job_before(pipeline.folder, stage.name)
    if job and state.is_current(stage):
        logs = pipeline.folder / "pipeline" / "logs"
        return "unfinished", "; ".join(
            filter(None, [standing.progress, f"see {logs}/{stage.name}-{job}*"])
        )
    return ("unfinished" if standing.progress else "not begun"), standing.progress


def nothing_missing(queue: dict[str, Queued]) -> str:
    """The message of a resume that has nothing to submit."""
    if not queue:
        return "every stage is done"
    waiting = ", ".join(
        f"{name} (job {queued.job}, {queued.state.lower()})" for name, queued in queue.items()
    )
    return f"nothing to submit: in the queue are {waiting}"


def local_lines(pipeline: Assembled, state: State, run: LocalRun) -> str:
    """The commands that a local run would start."""
    return "\n".join(
        f"# done before: {stage.name}"
        if state.standing(stage).complete
        else shlex.join(run.command(stage))
        for stage in pipeline.stages
    )
