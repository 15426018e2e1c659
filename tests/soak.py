"""A run of two processes under one fault after the other, held against the same run left alone.

    python -m tests.soak --hours 2 --folder /tmp/soak

A tiny model is trained by the real programs (launch/processes.py, megatron_slm.train). Every kind
of fault of FAULTS comes in random order, again and again, each at a random moment; the run is
started again after each that ended it. In every 37th step the gradients are NaN, and the step is
skipped. When the time is over the run is trained to its end, and then once more from the start
without a fault (but with the same steps skipped); that comes on top of the hours.

Every fault must end the run with its exit code, leave no process behind and cost no checkpoint. At
the end every metric of every line, and every bit of the weights, must be that of the run left
alone, the memory of the trainers must not have grown, and no process, port, shared memory or
temporary file may be left. Prints a table of what was done. Exit code 0 when all of this holds,
1 with a sentence when not, 2 for a folder that is in use.
"""

import argparse
import math
import os
import random
import resource
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_slm.checkpoint.folder import resolve_checkpoint
from tests.end_to_end.small_run import command, compared, environment, make_corpus
from tests.end_to_end.soak_job import (
    Job,
    SoakFailed,
    listening_sockets,
    processes_of,
    unused_shared_memory,
)
from tests.end_to_end.test_kills import newest

SAVE_STEPS = 25
LOG_STEPS = 10
NAN_STEPS = 37
HANG_SECONDS = 10
STEPS_A_SECOND = 100
"""More than any machine reaches; the planned length of a run is this times its time."""
FULL_DISK_BYTES = 16384
MEMORY_GROWTH_KIB = 16 * 1024
SAMPLES_FOR_GROWTH = 40
COMPILER_CACHE = "torchinductor_"
"""torch's cache of compiled kernels, empty here: one folder for each user, which every start uses
again.
"""
SETTINGS = {
    "schedule.style": "constant",  # so that the length of the run changes no step
    "schedule.warmup_fraction": "0",
    "checkpoint.interval_steps": str(SAVE_STEPS),
    "checkpoint.keep_last": "3",
    "checkpoint.asynchronous": "true",
    "monitoring.log_interval_steps": str(LOG_STEPS),
    "monitoring.hang_seconds": str(HANG_SECONDS),
    "optimizer.max_non_finite_steps": "1",
    "device.precision": "bf16",
}


def kill_a_rank(job: Job, chance: random.Random) -> None:
    os.kill(chance.choice(list(job.trainers().values())), signal.SIGKILL)


def kill_both_ranks(job: Job, chance: random.Random) -> None:
    for pid in job.trainers().values():
        os.kill(pid, signal.SIGKILL)


def kill_the_launcher(job: Job, chance: random.Random) -> None:
    os.kill(job.launcher.pid, signal.SIGKILL)


def stop_by_a_signal(job: Job, chance: random.Random) -> None:
    # Not SIGHUP: under nohup it is ignored, as it should be.
    stops = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    os.kill(job.launcher.pid, chance.choice(stops))


def stop_by_a_file(job: Job, chance: random.Random) -> None:
    (job.run / "stop_requested").touch()


def hang(job: Job, chance: random.Random) -> None:
    os.kill(chance.choice(list(job.trainers().values())), signal.SIGSTOP)


def slow_a_rank(job: Job, chance: random.Random) -> None:
    """Stopped for most of six seconds, never for as long as a run that hangs."""
    pid = chance.choice(list(job.trainers().values()))
    for _ in range(4):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)


def limit_files(job: Job, limit_bytes: int) -> None:
    """What a full disk does: no file of the trainers grows beyond this. Writers of checkpoints
    inherit it.
    """
    for pid in job.trainers().values():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


def fill_the_disk(job: Job, chance: random.Random) -> None:
    limit_files(job, FULL_DISK_BYTES)


def fill_the_disk_for_a_moment(job: Job, chance: random.Random) -> None:
    limit_files(job, FULL_DISK_BYTES)
    job.wait_for_words("could not be saved")
    if job.launcher.poll() is None:
        limit_files(job, resource.RLIM_INFINITY)


GOES_ON = None
FAULTS = {
    "SIGKILL to one rank": (kill_a_rank, {137}),
    "SIGKILL to both ranks": (kill_both_ranks, {137}),
    "SIGKILL to the launcher": (kill_the_launcher, {-signal.SIGKILL}),
    "a stop signal to the launcher": (stop_by_a_signal, {85}),
    "the file stop_requested": (stop_by_a_file, {85}),
    "SIGSTOP to one rank": (hang, {86}),
    "a slow rank": (slow_a_rank, {GOES_ON}),
    "a full disk": (fill_the_disk, {4}),
    "a full disk for a moment": (fill_the_disk_for_a_moment, {GOES_ON, 4}),
    "NaN gradients in every step": (None, {4}),  # from a step on, which the start is told
}
"""name -> (what is done to a start, the exit codes it may have; GOES_ON: the run goes on)."""


@dataclass
class Row:
    """One fault and what came of it."""

    fault: str
    at_step: int
    code: int | None
    seconds: float


@dataclass
class Soak:
    """The run under faults in `folder`/run, and the one left alone in `folder`/alone."""

    folder: Path
    seconds: float
    faults: list[str]
    rounds: int | None = None
    rows: list[Row] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    alone: list[Job] = field(default_factory=list)
    steps: int = 0
    saved: int = 0
    order: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.chance = random.Random(0)
        self.run = self.folder / "run"
        self.temporary = self.folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.planned_steps = max(1000, int(self.seconds * STEPS_A_SECOND))
        self.corpus = make_corpus(self.folder)
        self.shared_memory_before = unused_shared_memory()

    def start(self, run: Path, steps: int, nan_from: int | None = None) -> Job:
        settings = {**SETTINGS, "schedule.train_steps": str(steps)}
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        module = "tests.end_to_end.ailing_train"
        arguments = command(self.corpus, run, *words, processes=1, module=module)
        ailing = {"SLM_TEST_NAN_EVERY": str(NAN_STEPS), "TMPDIR": str(self.temporary)}
        if nan_from is not None:
            ailing["SLM_TEST_NAN_FROM"] = str(nan_from)
        job = Job(self.folder, run, arguments, environment() | ailing)
        (self.jobs if run == self.run else self.alone).append(job)
        return job

    def next_fault(self) -> str | None:
        """Every kind once in random order, then again; None = enough."""
        number = len(self.rows)
        time_is_over = time.monotonic() - self.begun >= self.seconds
        if time_is_over and number >= (self.rounds or 0) * len(self.faults):
            return None
        if number % len(self.faults) == 0:
            self.order = self.chance.sample(self.faults, len(self.faults))
        return self.order[number % len(self.faults)]

    def suffer(self) -> None:
        """One fault after the other until the time is over, then to the end of the run."""
        job: Job | None = None
        while (fault := self.next_fault()) is not None:
            done, expected = FAULTS[fault]
            if done is None and job is not None:
                self.end(job)
                job = None
            # Two steps in a row end the run, both between the same two checkpoints.
            nan_from = (self.saved // SAVE_STEPS + 2) * SAVE_STEPS + 1 if done is None else None
            job = job or self.start(self.run, self.planned_steps, nan_from)
            if done is None:
                job.wait_for_words("training diverged")
                at_step = nan_from
                begun = time.monotonic()
            else:
                at_step = job.train_for(5, self.chance.uniform(0, 6))
                begun = time.monotonic()
                done(job, self.chance)
            code = self.outcome(job, expected)
            seconds = time.monotonic() - begun
            if code is not GOES_ON:
                job = None
                self.look_at_checkpoints()
            self.rows.append(Row(fault, at_step, code, seconds))
            print(f"{fault} at step {at_step}: {said(code)}, {seconds:.1f} s", flush=True)
        if job is not None:
            self.end(job)
        self.steps = math.ceil((self.saved + 1) / SAVE_STEPS) * SAVE_STEPS + LOG_STEPS
        self.to_the_end(self.run)
        self.to_the_end(self.folder / "alone")

    def outcome(self, job: Job, expected: set) -> int | None:
        """How the start ended, or GOES_ON: it still trains."""
        if GOES_ON in expected and job.launcher.poll() is None:
            try:
                job.train_for(5, 0)
                return GOES_ON
            except SoakFailed:
                if job.launcher.poll() is None:
                    raise
        code = job.wait()
        if code not in expected:
            raise SoakFailed(f"exit code {code} instead of {sorted(map(str, expected))}")
        return code

    def end(self, job: Job) -> None:
        stop_by_a_signal(job, self.chance)
        self.outcome(job, {85})
        self.look_at_checkpoints()

    def look_at_checkpoints(self) -> None:
        """Between two starts: the newest checkpoint is whole, and none that was there is lost."""
        before = self.saved
        self.saved = newest(self.run) or 0
        if self.saved < before:
            raise SoakFailed(f"the checkpoint of step {before} was lost")

    def to_the_end(self, run: Path) -> None:
        code = self.start(run, self.steps).wait(max(600, self.seconds * 5))
        if code != 0:
            raise SoakFailed(f"the last start of {run} ended with {code}")

    def judge(self) -> list[str]:
        """What is wrong at the end; [] = nothing."""
        wrong = []
        alone = self.folder / "alone"
        if compared(self.run) != compared(alone):
            wrong.append("metrics differ from those of the run left alone")
        wrong += other_weights(*(resolve_checkpoint(run) for run in (self.run, alone)))
        for name, growth in self.growth_kib().items():
            if growth > MEMORY_GROWTH_KIB:
                wrong.append(f"the memory of {name} grew by {growth / 1024:.1f} MiB")
        return wrong + self.left_over()

    def growth_kib(self) -> dict[str, float]:
        """From the second quarter to the last, of every process that was looked at for twenty
        seconds: medians.
        """
        found = {}
        for number, job in enumerate([*self.jobs, *self.alone]):
            for rank, samples in job.memory_kib.items():
                quarter = len(samples) // 4
                if len(samples) >= SAMPLES_FOR_GROWTH:
                    early = samples[quarter : 2 * quarter]
                    late = samples[-quarter:]
                    growth = statistics.median(late) - statistics.median(early)
                    found[f"rank {rank} of start {number + 1}"] = growth
        return found

    def left_over(self) -> list[str]:
        sockets = set().union(*(job.sockets for job in [*self.jobs, *self.alone]))
        runs = [self.run, self.folder / "alone"]
        unfinished = [path for run in runs for path in (run / "checkpoints").glob(".*")]
        locked = [run.name for run in runs if (run / "lock").exists()]
        temporary = {path.name for path in self.temporary.iterdir()}
        compiler_caches = {path.name for path in self.temporary.glob(f"{COMPILER_CACHE}*")}
        left = {
            "processes": sorted(processes_of(self.folder)),
            "ports": sorted(sockets & listening_sockets()),
            "shared memory": sorted(unused_shared_memory() - self.shared_memory_before),
            "temporary files": sorted(temporary - compiler_caches),
            "locks": locked,
            "unfinished checkpoints": list(map(str, unfinished)),
        }
        return [f"left over: {name}: {values}" for name, values in left.items() if values]

    def table(self) -> str:
        """What was done, one row for each kind of fault, and the figures of the whole."""
        lines = [
            "| fault | times | how the starts ended | median seconds | longest |",
            "|---|---|---|---|---|",
        ]
        for fault in self.faults:
            rows = [row for row in self.rows if row.fault == fault]
            if not rows:
                continue
            seconds = [row.seconds for row in rows]
            ends = ", ".join(sorted({said(row.code) for row in rows}))
            lines.append(
                f"| {fault} | {len(rows)} | {ends} | {statistics.median(seconds):.1f} "
                f"| {max(seconds):.1f} |"
            )
        peaks = [max(job.memory_kib[0]) / 1024 for job in self.jobs if job.memory_kib[0]]
        growths = list(self.growth_kib().values())
        skipped = self.steps // NAN_STEPS
        lines += [
            "",
            f"{len(self.rows)} faults, {len(self.jobs)} starts, {self.steps} steps ({skipped} of "
            f"them skipped for NaN gradients), {(time.monotonic() - self.begun) / 60:.1f} minutes "
            "with the run left alone",
            f"largest memory of rank 0 by start: {min(peaks):.0f} to {max(peaks):.0f} MiB"
            if peaks
            else "memory: no start was long enough",
            f"growth within a start, in {len(growths)} processes of 20 s or more: "
            f"{min(growths) / 1024:.1f} to {max(growths) / 1024:.1f} MiB"
            if growths
            else "growth: no start was long enough",
        ]
        return "\n".join(lines)


def other_weights(ours: Path, alone: Path) -> list[str]:
    """Whether the weights of two checkpoints differ in any bit."""
    import torch

    from megatron_slm.device import choose_device

    choose_device("cpu")  # before megatron-core is imported
    from megatron_slm.convert.stored_state import read_full_state

    left = read_full_state(ours)
    right = read_full_state(alone)
    if list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left):
        return []
    return [f"the weights of {ours} differ from those of the run left alone, {alone}"]


def said(code: int | None) -> str:
    if code is GOES_ON:
        return "went on"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, required=True, help="how long faults are injected")
    parser.add_argument("--folder", type=Path, required=True, help="a folder to work in, made anew")
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        print(f"tests.soak: {folder} is not empty: name another --folder", file=sys.stderr)
        return 2
    return soak(Soak(folder, options.hours * 3600, list(FAULTS)))


def soak(it: Soak) -> int:
    """Run it, print its table, say what is wrong, and end whatever is left; the exit code."""
    try:
        it.suffer()
        wrong = it.judge()
    except (SoakFailed, AssertionError) as error:
        last = it.jobs[-1].output[-3000:] if it.jobs else ""
        wrong = [f"{error}\n{last}"]
    finally:
        for job in [*it.jobs, *it.alone]:
            job.kill()
    print(it.table())
    for sentence in wrong:
        print(f"tests.soak: {sentence}", file=sys.stderr)
    if not wrong:
        print("every metric and every weight is that of the run left alone; nothing is left")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
