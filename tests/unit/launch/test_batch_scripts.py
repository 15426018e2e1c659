"""The batch scripts, run by bash with stand-ins for srun, scontrol and python on the PATH: command lines, signals, requeue decisions."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "launch"

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]

SRUN = r"""#!/bin/bash
# Runs the command as the first node would, after noting the options.
printf '%s\n' "$*" >> "$SCRATCH/srun.log"
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0
exec "$@"
"""
SCONTROL = r"""#!/bin/bash
printf '%s\n' "$*" >> "$SCRATCH/scontrol.log"
if [ "$1" = show ]; then printf 'node07\nnode08\n'; fi
"""
# Plays processes.py with its trainers or scorers. WORK says how it ends: a number = at once with that exit code; save, stall = when asked to stop.
PYTHON = r"""#!/bin/bash
if [[ "$*" == *programs.py* ]]; then exec "$REAL_PYTHON" "$@"; fi
if [[ "$*" == *--print_run_folder* ]]; then
    if [[ "$*" == *--nonsense* ]]; then echo "nonsense: unknown field" >&2; exit 2; fi
    printf '%s\n' "$RUN_FOLDER"
    exit 0
fi
if [[ "$*" == *--print_output* ]]; then printf '%s\n' "$STORE"; exit "${NO_STORE:-0}"; fi
printf '%s\n' "$*" >> "$SCRATCH/python.log"
trap 'echo asked >> "$SCRATCH/signals.log"; exit "${WHEN_ASKED:-143}"' TERM
[ -e "$RUN_FOLDER/stop_requested" ] && touch "$SCRATCH/stale_stop_file_seen"
[ "$WORK" = score ] && mkdir -p "$STORE/shards" && touch "$STORE/shards/shard_000001.json"
touch "$SCRATCH/started"
case $WORK in
    [0-9]*) exit "$WORK" ;;
    score) while sleep 0.05; do :; done ;;
    *) while [ ! -e "$RUN_FOLDER/stop_requested" ]; do sleep 0.05; done
       rm "$RUN_FOLDER/stop_requested"
       if [ "$WORK" = save ]; then mkdir -p "$RUN_FOLDER/checkpoints"; echo step_00000042 > "$RUN_FOLDER/checkpoints/latest"; fi
       exit 85 ;;
esac
"""


class Cluster:
    """A checkout and a PATH of stand-ins in a temporary folder."""

    def __init__(self, folder: Path):
        # Quotes, and so long that YAML would fold it at its spaces.
        self.folder = folder
        self.run_folder = folder / 'the lab\'s "shared" disk' / " and on".join(["on"] * 20) / "run"
        shutil.copytree(LAUNCH, folder / "launch")
        for program in (
            "megatron_slm/train.py",
            "megatron_slm/report.py",
            "data_tools/preprocess.py",
        ):
            (folder / program).parent.mkdir(exist_ok=True)
            shutil.copy(LAUNCH.parent / program, folder / program)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SCRATCH": str(folder),
            "REAL_PYTHON": sys.executable,
            "RUN_FOLDER": str(self.run_folder),
            "STORE": str(folder / "the lab's store"),
            "SLM_VENV": "/nonexistent",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_CPUS_ON_NODE": "64",
        }

    def start(
        self, script: str, *arguments: str, work: str, **environment: str
    ) -> subprocess.Popen:
        spool = self.folder / "spool"  # SLURM runs a copy of the script from elsewhere
        spool.mkdir(exist_ok=True)
        (self.folder / "started").unlink(missing_ok=True)
        copy = (
            shutil.copy(self.folder / "launch" / script, spool / "slurm_script")
            if script.endswith(".sbatch")
            else self.folder / "launch" / script
        )
        return subprocess.Popen(
            ["bash", copy, *arguments],
            env={**self.environment, "WORK": work, **environment},
            cwd=spool,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_take_interrupts,
        )

    def run(
        self, script: str, *arguments: str, work: str, send: int | None = None, **environment: str
    ) -> tuple[int, str]:
        process = self.start(script, *arguments, work=work, **environment)
        if send is not None:
            self.wait_for("started", process)
            process.send_signal(send)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, output

    def wait_for(self, name: str, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)

    def log(self, name: str) -> list[str]:
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    def requeued(self) -> list[str]:
        return [line for line in self.log("scontrol") if line.startswith("requeue")]


def _take_interrupts() -> None:
    """A test run in the background of a shell, or under nohup, ignores signals, and bash cannot trap what was ignored when it started."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


TRAIN = ("--config", "recipe with spaces.yaml", "--selection.keep_fraction", "0.6")


def test_one_torchrun_per_node_meets_at_the_first_node(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, work="0")
    assert code == 0 and "done" in output
    config_step, train_step = cluster.log("srun")[0], "\n".join(cluster.log("srun")[1:])
    assert config_step.startswith(
        "--nodes=1 --ntasks=1 python -m megatron_slm.train --config recipe with spaces.yaml"
    )
    assert train_step.startswith(
        "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 --kill-on-bad-exit=1 bash -c"
    )
    [command] = cluster.log("python")
    port = 10000 + 123456 % 20000
    assert command == (
        f"{cluster.folder}/launch/processes.py --nnodes=2 --node-rank=0 --nproc-per-node=8 --max-restarts=0 --master-addr=node07 --master-port={port} "
        "-m megatron_slm.train --config recipe with spaces.yaml --selection.keep_fraction 0.6"
    )
    assert not cluster.requeued()


def test_each_restart_meets_at_another_port(cluster):
    cluster.run("train.sbatch", *TRAIN, work="0", SLURM_RESTART_COUNT="1")
    assert f"--master-port={10000 + (123456 + 101) % 20000} " in cluster.log("python")[0]


def test_near_the_time_limit_the_run_is_stopped_saved_and_requeued(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, work="save", send=signal.SIGUSR1)
    assert cluster.requeued() == ["requeue 123456"], output
    assert code == 0
    assert not (cluster.run_folder / "stop_requested").exists()


def test_a_start_that_saved_nothing_new_is_not_requeued(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, work="stall", send=signal.SIGUSR1)
    assert not cluster.requeued()
    assert code == 85 and "made no progress" in output


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
def test_scancel_or_preemption_saves_and_leaves_requeueing_to_slurm(cluster, number):
    code, output = cluster.run("train.sbatch", *TRAIN, work="save", send=number)
    assert not cluster.requeued()
    assert code == 85 and "step_00000042" in output


@pytest.mark.parametrize("failure", ["1", "3", "4", "137"])
def test_a_failure_is_passed_on_and_not_requeued(cluster, failure):
    code, output = cluster.run("train.sbatch", *TRAIN, work=failure)
    assert code == int(failure) and f"exit code {failure}" in output
    assert not cluster.requeued()


def test_stopping_by_hand_is_not_requeued(cluster):
    process = cluster.start("train.sbatch", *TRAIN, work="save")
    cluster.wait_for("started", process)
    (cluster.run_folder / "stop_requested").touch()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 85 and not cluster.requeued(), output


def test_a_stop_file_left_by_a_killed_job_does_not_stop_the_next(cluster):
    cluster.run_folder.mkdir(parents=True)
    (cluster.run_folder / "stop_requested").touch()
    assert cluster.run("train.sbatch", *TRAIN, work="0")[0] == 0
    assert not (cluster.folder / "stale_stop_file_seen").exists()


def test_a_bad_configuration_ends_the_job_before_the_nodes_start(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, "--nonsense", work="0")
    assert code == 2 and "nonsense: unknown field" in output
    assert not cluster.log("python")


def test_submitting_from_elsewhere_is_explained(cluster, tmp_path):
    code, output = cluster.run(
        "train.sbatch", *TRAIN, work="0", SLURM_SUBMIT_DIR=str(tmp_path / "spool")
    )
    assert code == 2 and "submit from it, or set SLM_ROOT" in output


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "7",
}


def test_each_scoring_job_takes_its_share(cluster):
    code, output = cluster.run(
        "score.sbatch", "--checkpoint", "runs/reference", "--output", "scores", work="0", **ARRAY
    )
    assert code == 0, output
    assert cluster.log("python")[0].endswith(
        "-m megatron_slm.score --checkpoint runs/reference --output scores --shard 3/8"
    )


def test_shares_need_all_array_ids(cluster):
    code, output = cluster.run(
        "score.sbatch", "--output=scores", work="0", **{**ARRAY, "SLURM_ARRAY_TASK_MIN": "2"}
    )
    assert code == 2 and "without gaps" in output
    code, output = cluster.run("score.sbatch", "--corpus", "c", work="0", NO_STORE="2", **ARRAY)
    assert (code, cluster.log("python")) == (2, []), output


def test_scoring_is_stopped_and_requeued_when_shards_were_finished(cluster):
    store = cluster.environment["STORE"]
    code, output = cluster.run(
        "score.sbatch", "--output", store, work="score", send=signal.SIGUSR1, **ARRAY
    )
    assert cluster.log("signals") == ["asked"]
    assert code == 0 and cluster.requeued() == ["requeue 123456"], output
    code, output = cluster.run(
        "score.sbatch", "--output", store, work="score", send=signal.SIGUSR1, **ARRAY
    )
    assert code != 0 and len(cluster.requeued()) == 1 and "made no progress" in output


@pytest.mark.parametrize("program", ["train", "score"])
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_local_runs_are_asked_to_stop_and_waited_for(cluster, program, number):
    code, output = cluster.run(
        "local.sh", "2", program, *TRAIN, work="stall", send=number, WHEN_ASKED="85"
    )
    assert code == 85, output
    assert f"stopping {program}; once more to stop at once" in output
    assert cluster.log("signals") == ["asked"]
    assert cluster.log("python")[0].endswith(
        f"--standalone --nproc-per-node=2 --max-restarts=0 -m megatron_slm.{program} "
        "--config recipe with spaces.yaml --selection.keep_fraction 0.6"
    )


def test_a_stop_file_left_by_a_killed_local_run_does_not_stop_the_next(cluster):
    cluster.run_folder.mkdir(parents=True)
    (cluster.run_folder / "stop_requested").touch()
    assert cluster.run("local.sh", "2", "train", *TRAIN, work="0")[0] == 0
    assert not (cluster.folder / "stale_stop_file_seen").exists()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("trian", "no program is called 'trian'; did you mean train?"),
        ("report", "report runs in one process: python -m megatron_slm.report"),
        ("preprocess", "preprocess runs in one process: python -m data_tools.preprocess"),
    ],
)
def test_only_programs_of_several_processes_are_started(cluster, name, sentence):
    code, output = cluster.run("local.sh", "2", name, "--runs", "x", work="0")
    assert (code, sentence in output) == (2, True), output
    assert not cluster.log("python")


@pytest.mark.parametrize(
    "program, words", [("train", ("--help",)), ("score", ("--output", "x", "--help"))]
)
def test_help_is_shown_by_one_process(cluster, program, words):
    code, output = cluster.run("local.sh", "2", program, *words, work="0")
    assert code == 0, output
    assert cluster.log("python") == [f"-m megatron_slm.{program} {' '.join(words)}"]


def test_bad_options_of_score_are_said_before_torchrun_starts(cluster):
    code, output = cluster.run("local.sh", "2", "score", "--corpus", "c", work="0", NO_STORE="2")
    assert (code, cluster.log("python")) == (2, []), output


def test_local_usage_is_shown(cluster):
    code, output = cluster.run("local.sh", "train", work="0")
    assert code == 2 and "bash launch/local.sh 2 train" in output


@pytest.mark.parametrize(
    "script", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name
)
def test_bash_and_shellcheck_accept_it(script):
    subprocess.run(["bash", "-n", script], check=True)
    if checker := shutil.which("shellcheck"):
        # Variables and functions used across sourced files and traps look unused to it.
        subprocess.run(
            [checker, "--shell=bash", "--exclude=SC1091,SC2034,SC2317", script], check=True
        )
