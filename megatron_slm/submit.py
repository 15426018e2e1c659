"""The whole pipeline from one description: text, tokenizer, corpora, scores, runs, exports, report.

    python -m megatron_slm.submit --config PIPELINE.yaml              SLURM jobs that wait for each
        other
    python -m megatron_slm.submit --config PIPELINE.yaml --dry-run    print every sbatch line
    python -m megatron_slm.submit --config PIPELINE.yaml --local      here, one stage after the
        other

Everything is checked before anything is started. Finished stages are kept for as long as what they
were made from is unchanged. Exit codes: 0 done (or submitted), 2 bad description, 3 bad data, 4
SLURM or the disk failed, 85 stopped on request (--local); with --local also that of the stage that
failed. See docs/pipeline.md and launch/pipelines/.
"""

import contextlib
import sys

from megatron_slm.config.load import (
    CHECK_ONLY,
    ConfigError,
    PrintedPath,
    parse_config,
    split_arguments,
)
from megatron_slm.files.folder_lock import FolderInUse, FolderLock
from megatron_slm.installation import checkout, says_missing_extra
from megatron_slm.pipeline import slurm, status
from megatron_slm.pipeline.checks import Assembled, assemble
from megatron_slm.pipeline.code import code_in_the_description_alone
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.pipeline.local import LocalRun
from megatron_slm.pipeline.state import State
from megatron_slm.training.setup import RunInputError

OWN_OPTIONS = {
    "--dry-run": "Check everything, print what would be submitted (or run: --local), and stop.",
    "--resume": "Submit what is missing of a pipeline that was submitted before.",
    "--status": "Show where each stage stands, and stop.",
    "--local": "Run on this machine without SLURM; what is finished already is kept.",
}
CHECKOUT = checkout()
FOLDER = PrintedPath("print_folder", lambda description: description.folder)


@says_missing_extra("submit")
def main(argv: list[str] | None = None) -> int:
    """Read and check the description, then carry out the options; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = {*OWN_OPTIONS, CHECK_ONLY.replace("_", "-")}
    asked = {word.replace("_", "-") for word in words} & own
    words = [word for word in words if word.replace("_", "-") not in own]
    try:
        description = parse_config(
            words, "slm-submit", __doc__, Pipeline, printed_path=FOLDER, own_options=OWN_OPTIONS
        )
        if problems := [
            *code_in_the_description_alone(description, _without_config(words), CHECKOUT)
        ]:
            raise ConfigError(problems)
        if not (CHECKOUT / "launch" / "local.sh").is_file():
            raise ConfigError([f"{CHECKOUT} is no checkout: submit needs its folder launch/"])
        pipeline = assemble(description, "--local" in asked)
        if "--check-only" in asked:
            print(description.folder)
            return 0
        return _do(pipeline, asked)
    except (ConfigError, FolderInUse) as error:
        print(f"submit: {error}", file=sys.stderr)
        return 3 if isinstance(error, RunInputError) else 2
    except OSError as error:
        print(f"submit: {error}", file=sys.stderr)
        return 4


def _without_config(words: list[str]) -> list[str]:
    """The options that name settings: the path of the description names no code."""
    given, _ = split_arguments(words)
    return [f"--{name} {value}" for name, value in given.items() if name != "config"]


def _do(pipeline: Assembled, asked: set[str]) -> int:
    state = State(pipeline)
    if "--local" in asked:
        return _locally(LocalRun(pipeline, state, CHECKOUT), pipeline, state, asked)
    cluster = slurm.Cluster(pipeline, state, CHECKOUT)
    queue = _queue(cluster, must_answer="--dry-run" not in asked)
    if "--status" in asked:
        status.show(pipeline, state, queue)
        return 0
    if slurm.was_submitted(pipeline.folder) and not asked & {"--resume", "--dry-run"}:
        raise ConfigError(
            [
                f"{pipeline.folder}: was submitted before; --resume submits what is missing, "
                "--status shows where it stands"
            ]
        )
    missing, dead = slurm.missing(pipeline, state, queue)
    alive = {name: each for name, each in queue.items() if name not in dead}
    if "--dry-run" in asked:
        print(slurm.script_of(cluster, missing, alive))
        return 0
    if problems := cluster.problems(missing):
        raise ConfigError(problems)
    if not missing:
        print(status.nothing_missing(alive))
        return 0
    with _alone(pipeline):
        for name in dead:
            cluster.cancel(queue[name])
        state.write(pipeline)
        slurm.write_script(pipeline.folder, slurm.script_of(cluster, missing, alive))
        cluster.submit(missing, alive, print)
    return 0


def _queue(cluster: slurm.Cluster, must_answer: bool) -> dict[str, slurm.Queued]:
    try:
        return cluster.queue()
    except slurm.SlurmError as error:
        if must_answer:
            raise
        print(f"submit: {error}; what is in the queue is not known", file=sys.stderr)
        return {}


def _locally(run: LocalRun, pipeline: Assembled, state: State, asked: set[str]) -> int:
    if "--status" in asked:
        status.show(pipeline, state, {})
        return 0
    if "--dry-run" in asked:
        print(status.local_lines(pipeline, state, run))
        return 0
    _refuse_beside_jobs(pipeline, state)
    with _alone(pipeline):
        state.write(pipeline)
        return run.run()


def _refuse_beside_jobs(pipeline: Assembled, state: State) -> None:
    """ConfigError where jobs of this pipeline wait or run: they write into the same places."""
    if not slurm.was_submitted(pipeline.folder):
        return
    if queue := _queue(slurm.Cluster(pipeline, state, CHECKOUT), must_answer=False):
        jobs = " ".join(each.job for each in queue.values())
        raise ConfigError(
            [f"{pipeline.folder}: jobs of this pipeline are in the queue; scancel {jobs} first"]
        )


def _alone(pipeline: Assembled) -> contextlib.AbstractContextManager:
    return FolderLock(
        pipeline.folder / "pipeline",
        "another submit",
        "Let it end, or give this pipeline another folder",
    )


if __name__ == "__main__":
    sys.exit(main())
