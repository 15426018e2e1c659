"""The stages of a pipeline as SLURM jobs that wait for each other: lines, queue, submission."""

import datetime
import hashlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.load import ConfigError
from megatron_slm.files.atomic import write_text_atomically
from megatron_slm.pipeline.checks import Assembled
from megatron_slm.pipeline.outputs import Files
from megatron_slm.pipeline.stages import PREPROCESS, PROGRAM, SCORE, TRAIN, Stage
from megatron_slm.pipeline.state import State

SCRIPTS = {
    PROGRAM: "launch/program.sbatch",
    PREPROCESS: "launch/preprocess.sbatch",
    TRAIN: "launch/train.sbatch",
    SCORE: "launch/score.sbatch",
}
NEVER = "DependencyNeverSatisfied"


class SlurmError(OSError):
    """SLURM refused something, or did not answer."""


@dataclass(frozen=True)
class Queued:
    """A job in the queue."""

    job: str
    state: str
    """PENDING, RUNNING, ..."""
    reason: str


@dataclass(frozen=True)
class Submission:
    """One sbatch line without its dependencies."""

    stage: Stage
    command: tuple[str, ...]
    environment: dict[str, str]

    def with_options(self, *options: str) -> list[str]:
        return [*self.command[:1], *options, *self.command[1:]]

    def printed(self, after: list[str]) -> str:
        """The line for a shell; `after` are the job ids, such as $corpus."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        options = ["--parsable"]
        options += [f"--dependency=afterok:{':'.join(after)}"] if after else []
        rest = [shlex.quote(word) for word in self.command[1:]]
        line = " ".join([*variables, "sbatch", *options, *rest])
        return f"{variable_of(self.stage)}=$({line})"


def variable_of(stage: Stage) -> str:
    """A shell variable for the stage's job id."""
    return "job_" + re.sub(r"\W", "_", stage.name)


class Cluster:
    """SLURM, as one pipeline sees it."""

    def __init__(self, pipeline: Assembled, state: State, checkout: Path):
        self._pipeline = pipeline
        self._state = state
        self._checkout = checkout
        digest = hashlib.sha256(str(pipeline.folder).encode()).hexdigest()[:8]
        self._suffix = f"@{digest}"
        """Tells jobs of this pipeline from those of another in the same queue."""

    def submission(self, stage: Stage) -> Submission:
        """The sbatch line of a stage."""
        logs = self._pipeline.folder / "pipeline" / "logs"
        number = "%A_%a" if stage.jobs > 1 or stage.kind == SCORE else "%j"
        command_line = [
            "sbatch",
            f"--job-name={stage.name}{self._suffix}",
            "--kill-on-invalid-dep=yes",
        ]
        command_line += [f"--output={logs / stage.name}-{number}.out"]
        if stage.jobs > 1 or stage.kind == SCORE:
            command_line += [f"--array=0-{stage.jobs - 1}"]
        command_line += [f"--nodes={stage.resources.nodes}", *_options(stage.resources.sbatch)]
        command_line += [str(self._checkout / SCRIPTS[stage.kind])]
        environment = {"SLM_ROOT": str(self._checkout), **dict(stage.environment)}
        if stage.kind in (TRAIN, SCORE):
            environment["SLM_PROCESSES_PER_NODE"] = str(stage.resources.processes_per_node)
        if isinstance(stage.output, Files):
            environment["SLM_DONE_FILE"] = str(self._state.mark(stage))
            environment["SLM_DONE_KEY"] = self._state.keys[stage.name]
        if stage.kind != PREPROCESS:
            command_line += stage.command
        return Submission(stage, tuple(command_line), environment)

    def problems(self, stages: list[Stage]) -> list[str]:
        """What sbatch itself would refuse, by --test-only, without submitting anything."""
        refusals: dict[str, str] = {}
        for stage in stages:
            done = self._run(self.submission(stage), "--test-only")
            if done.returncode:
                reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
                refusals.setdefault(reason, f"{stage.name}: sbatch refuses it: {reason}")
        return list(refusals.values())

    def queue(self) -> dict[str, Queued]:
        """The jobs of this pipeline that wait or run, by stage. SlurmError: no answer."""
        command = ["squeue", "--noheader", "--format=%F|%T|%r|%j"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            advice = "submit from a login node, or give --local"
            raise SlurmError(f"squeue cannot be started ({error.strerror}); {advice}") from None
        if done.returncode:
            raise SlurmError(f"squeue failed: {' '.join(done.stderr.split())}")
        jobs: dict[str, Queued] = {}
        for line in done.stdout.splitlines():
            job, state, reason, name = line.strip().split("|", 3)
            stage = name.removesuffix(self._suffix)
            if stage != name and (stage not in jobs or state == "RUNNING"):
                jobs[stage] = Queued(job, state, reason)
        return jobs

    def submit(
        self, stages: list[Stage], queue: dict[str, Queued], say: Callable
    ) -> dict[str, str]:
        """Submit stages, in order, after those of `queue` and each other; returns stage -> job id.

        SlurmError at the first that is refused: what was submitted before it stays.
        """
        jobs = {name: queued.job for name, queued in queue.items()}
        submitted = {}
        for stage in stages:
            if moved := self._state.begin(stage):
                say(moved)
            submission = self.submission(stage)
            after = [jobs[name] for name in stage.after if name in jobs]
            options = ["--parsable"]
            options += [f"--dependency=afterok:{':'.join(after)}"] if after else []
            done = self._run(submission, *options)
            if done.returncode:
                raise SlurmError(f"{stage.name}: sbatch: {' '.join(done.stderr.split())}")
            job = done.stdout.strip().split(";")[0]
            jobs[stage.name] = submitted[stage.name] = job
            self._note(stage, job, submission.printed(after))
            say(f"{stage.name}: job {job}{' after ' + ', '.join(after) if after else ''}")
        return submitted

    def cancel(self, queued: Queued) -> None:
        """Take a job out of the queue that can never start."""
        subprocess.run(["scancel", queued.job], capture_output=True)

    def _run(self, submission: Submission, *options: str) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                submission.with_options(*options),
                env={**os.environ, **submission.environment},
                cwd=self._checkout,
                capture_output=True,
                text=True,
            )
        except OSError as error:
            raise SlurmError(f"sbatch cannot be started: {error.strerror}") from None

    def _note(self, stage: Stage, job: str, line: str) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        note = {"stage": stage.name, "job": job, "submitted_at": now, "line": line}
        with open(self._pipeline.folder / "pipeline" / "jobs.jsonl", "a") as file:
            file.write(json.dumps(note) + "\n")


def was_submitted(folder: Path) -> bool:
    """Whether jobs of the pipeline in this folder were ever submitted."""
    return (folder / "pipeline" / "jobs.jsonl").exists()


def job_before(folder: Path, stage: str) -> str:
    """The newest job id that was ever noted for a stage; "" where there is none."""
    try:
        lines = (folder / "pipeline" / "jobs.jsonl").read_text().splitlines()
    except OSError:
        return ""
    jobs = [note["job"] for note in map(json.loads, lines) if note["stage"] == stage]
    return jobs[-1] if jobs else ""


def script_of(cluster: Cluster, stages: list[Stage], queue: dict[str, Queued]) -> str:
    """The sbatch lines of stages as a shell script: job ids in variables, dependencies by them."""
    lines = []
    among = {stage.name: f"${{{variable_of(stage)}}}" for stage in stages}
    for stage in stages:
        waits_for = [
            among.get(name) or queue[name].job
            for name in stage.after
            if name in among or name in queue
        ]
        lines.append(cluster.submission(stage).printed(waits_for))
    return "\n".join(lines)


def write_script(folder: Path, text: str) -> None:
    """pipeline/submit.sh: the lines, for people."""
    write_text_atomically(folder / "pipeline" / "submit.sh", text + "\n")


def _options(sbatch: dict) -> list[str]:
    """{gpus_per_node: 8, exclusive: true} as --gpus-per-node=8 --exclusive; false is left out."""
    words = []
    for name, value in sbatch.items():
        option = "--" + str(name).replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not False:
            words.append(f"{option}={value}")
    return words


def missing(
    pipeline: Assembled, state: State, queue: dict[str, Queued]
) -> tuple[list[Stage], list[str]]:
    """The stages to submit, and the names of queued jobs that can never start, to be cancelled.

    ConfigError when a job still runs from an earlier description: two would write into one place.
    """
    wanted: list[Stage] = []
    dead: list[str] = []
    problems = []
    for stage in pipeline.stages:
        if state.standing(stage).complete:
            continue
        queued = queue.get(stage.name)
        again = {each.name for each in wanted} & {*stage.after}
        if queued is None:
            wanted.append(stage)
        elif queued.reason == NEVER or (again and queued.state == "PENDING"):
            wanted.append(stage)
            dead.append(stage.name)
        elif not state.is_current(stage):
            problems.append(
                f"{stage.name}: job {queued.job} was submitted from an earlier description; let "
                f"it end, or scancel {queued.job}"
            )
    if problems:
        raise ConfigError(problems)
    return wanted, dead
