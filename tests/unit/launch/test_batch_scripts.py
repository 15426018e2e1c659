"""launch/train.sbatch under bash with stand-ins: command lines, signals, codes, requeues."""

import shutil
import signal
import subprocess

import pytest

from tests.unit.launch.stand_ins import LAUNCH, TRAIN


def test_one_torchrun_per_node_meets_at_the_first_node(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, work="0")
    assert code == 0
    assert "done" in output
    config_step, train_step = cluster.log("srun")[0], "\n".join(cluster.log("srun")[1:])
    assert config_step.startswith(
        "--nodes=1 --ntasks=1 python -m megatron_slm.train --config recipe with spaces.yaml"
    )
    assert cluster.log("check")[1] == "WORLD_SIZE=16"
    assert train_step.startswith(
        "--nodes=2 --nodelist=node07,node08 --ntasks=2 --ntasks-per-node=1 --distribution=block "
        "--cpus-per-task=64 --kill-on-bad-exit=1 bash -c"
    )
    [command] = cluster.log("python")
    port = 10000 + 123456 % 20000
    assert command == (
        f"{cluster.folder}/launch/processes.py --nnodes=2 --node-rank=0 --nproc-per-node=8 "
        f"--max-restarts=0 --master-addr=node07 --master-port={port} -m megatron_slm.train "
        "--config recipe with spaces.yaml --selection.keep_fraction 0.6"
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
    assert code == 85
    assert "made no progress" in output


def test_a_pace_that_needs_too_many_starts_is_not_requeued(cluster):
    many = {"STEPS": "100000", "SLM_MAX_REQUEUES": "200", "SLURM_RESTART_COUNT": "3"}
    code, output = cluster.run("train.sbatch", *TRAIN, work="save", send=signal.SIGUSR1, **many)
    assert (code, cluster.requeued()) == (85, []), output
    assert "from step 0 to 42 of 100000; at this pace the rest takes 2380 more starts" in output
    many["STEPS"] = "8000"
    (cluster.run_folder / "checkpoints" / "latest").unlink()
    code, output = cluster.run("train.sbatch", *TRAIN, work="save", send=signal.SIGUSR1, **many)
    assert (code, cluster.requeued()) == (0, ["requeue 123456"]), output


def test_requeues_are_counted(cluster):
    counted = {"SLM_MAX_REQUEUES": "3", "SLURM_RESTART_COUNT": "3"}
    code, output = cluster.run("train.sbatch", *TRAIN, work="save", send=signal.SIGUSR1, **counted)
    assert (code, cluster.requeued()) == (85, []), output
    assert "put back 3 times, and SLM_MAX_REQUEUES is 3" in output


def test_a_requeue_that_slurm_refuses_is_said(cluster):
    code, output = cluster.run(
        "train.sbatch", *TRAIN, work="save", send=signal.SIGUSR1, REFUSED="1"
    )
    assert code == 85
    assert "not requeued: scontrol refused" in output


@pytest.mark.parametrize("saved, requeued", [("", []), ("12", ["requeue 123456"])])
def test_a_run_that_hung_is_requeued_when_it_had_made_progress(cluster, saved, requeued):
    code, output = cluster.run("train.sbatch", *TRAIN, work="86", SAVED=saved)
    assert (code, cluster.requeued()) == (0 if requeued else 86, requeued), output
    assert f"stacks of its processes are in {cluster.run_folder}/ranks" in output


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
@pytest.mark.parametrize(
    "restarts, sentence",
    [
        ("0", "SLURM has not put the job back into the queue; submit the same command"),
        ("1", "SLURM has put the job back into the queue, where it continues"),
    ],
)
def test_who_ends_the_job_decides_on_the_queue(cluster, number, restarts, sentence):
    code, output = cluster.run("train.sbatch", *TRAIN, work="save", send=number, RESTARTS=restarts)
    assert not cluster.requeued()
    assert code == 85
    assert f"stopped at step 42; {sentence}" in output


def test_at_the_limit_itself_the_run_is_requeued_too(cluster):
    """No warning came, or the save took longer than it: SLURM's KillWait is left."""
    code, output = cluster.run(
        "train.sbatch", *TRAIN, work="save", send=signal.SIGTERM, RAN="1-00:00:03"
    )
    assert (code, cluster.requeued()) == (0, ["requeue 123456"]), output
    assert "SLURM ends this start of the job: the time limit is reached" in output


@pytest.mark.parametrize("failure", ["1", "2", "3", "4", "137"])
def test_a_failure_is_passed_on_and_not_requeued(cluster, failure):
    code, output = cluster.run("train.sbatch", *TRAIN, work=failure)
    assert code == int(failure)
    assert f"failed with exit code {failure}; not requeued" in output
    assert not cluster.requeued()


@pytest.mark.parametrize(
    "said, asked, expected",
    [
        ([85, 85], "limit", 85),
        ([3, 1], "", 3),
        ([1, 3], "", 3),  # the first to say something is not always the first that failed
        ([1, 137], "", 137),
        ([134, 86], "", 86),
        ([1, 85], "", 1),  # SLURM told the other node to end, and it stopped as it was told
        ([1, 85], "limit", 85),  # asked, and one missed the other before it was done
        ([85, 4], "limit", 4),
        ([], "", 143),  # nobody said anything: srun's own code
    ],
)
def test_the_code_of_the_run_is_found_among_those_of_all_nodes(cluster, said, asked, expected):
    lines = [f"processes.py: exit code {code}: process 1 on n2 failed first" for code in said]
    script = f"""
        set -euo pipefail
        SLM_ASKED={asked} SLM_STOP_STEP=true
        source launch/slurm.sh
        slm_srun() {{ printf '%s\n' 'Traceback' "$@" 'the end' >&2; exit 143; }}
        slm_run_step "$@"
        exit "$SLM_EXIT_CODE"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", *lines], cwd=cluster.folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (expected, "")
    assert done.stderr.splitlines() == ["Traceback", *(lines or [""])[: len(lines)], "the end"]


@pytest.mark.parametrize("program", ["train", "score"])
def test_a_warning_that_comes_first_is_heard_and_nothing_is_started(cluster, program):
    """A limit that is shorter than the warning would otherwise give one step per start for ever."""
    slow = cluster.folder / "slow_env.sh"
    slow.write_text('touch "$SCRATCH/reading"\nsleep 0.5\nsource "$SLM_ROOT/launch/env.sh"\n')
    code, output = cluster.run(
        f"{program}.sbatch",
        *TRAIN,
        work="0",
        send=signal.SIGUSR1,
        when="reading",
        SLM_ENV=str(slow),
    )
    assert (code, cluster.log("python"), cluster.requeued()) == (85, [], []), output
    assert "not started, and not requeued" in output
    assert "--signal=B:USR1@SECONDS" in output
    code, output = cluster.run(
        f"{program}.sbatch",
        *TRAIN,
        work="0",
        send=signal.SIGTERM,
        when="checking",
        CHECK_SECONDS="0.5",
        RESTARTS="1",
    )
    assert (code, cluster.log("python")) == (85, []), output
    assert "SLURM has put the job back into the queue" in output


def test_a_run_folder_that_cannot_be_written_is_no_reason_to_go_on(cluster):
    """The stop file's place is taken by a folder that cannot be touched either: root may write
    everywhere.
    """
    blocked = {"WHEN_ASKED": "4"}
    process = cluster.start("train.sbatch", *TRAIN, work="save", **blocked)
    cluster.wait_for("started", process)
    shutil.rmtree(cluster.run_folder)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.requeued()) == (4, []), output
    assert "the run folder cannot be written: asking the processes to stop by a signal" in output
    assert cluster.log("scancel") == ["--signal=USR1 123456"]


def test_stopping_by_hand_is_not_requeued(cluster):
    process = cluster.start("train.sbatch", *TRAIN, work="save")
    cluster.wait_for("started", process)
    (cluster.run_folder / "stop_requested").touch()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 85, output
    assert not cluster.requeued(), output


def test_a_stop_file_is_left_to_the_check_which_locks_the_run_folder(cluster):
    """The script cannot tell one that a killed job left from a request to a run that lives."""
    cluster.run_folder.mkdir(parents=True)
    (cluster.run_folder / "stop_requested").touch()
    assert cluster.run("train.sbatch", *TRAIN, work="0")[0] == 0
    assert (cluster.folder / "stop_file_seen").exists()


def test_a_bad_configuration_ends_the_job_before_the_nodes_start(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, "--nonsense", work="0")
    assert code == 2
    assert "nonsense: unknown field" in output
    assert not cluster.log("python")


def test_submitting_from_elsewhere_is_explained(cluster, tmp_path):
    code, output = cluster.run(
        "train.sbatch", *TRAIN, work="0", SLURM_SUBMIT_DIR=str(tmp_path / "spool")
    )
    assert code == 2
    assert "submit from it, or set SLM_ROOT" in output


SPARE = {
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "node07,node08,node09",
    "SLM_NODES": "2",
    "SAVED": "12",
}


def test_a_spare_node_takes_the_place_of_one_that_slurm_took(cluster):
    left = {"NODES_LEFT": "node07,node09"}
    code, output = cluster.run("train.sbatch", *TRAIN, work="1", WORK_AGAIN="0", **SPARE, **left)
    assert (code, cluster.requeued()) == (0, []), output
    assert "SLURM took a node from the job: going on with node07,node09" in output
    assert cluster.log("check")[1] == "WORLD_SIZE=16"
    steps = [line for line in cluster.log("srun") if line.startswith("--nodes=2")]
    assert [step.split()[1] for step in steps] == [
        "--nodelist=node07,node08",
        "--nodelist=node07,node09",
    ]
    ports = [10000 + (123456 + 101 * start) % 20000 for start in (0, 1)]
    assert [
        f"--master-port={port} " in line
        for port, line in zip(ports, cluster.log("python"), strict=True)
    ] == [
        True,
        True,
    ]


def test_without_a_spare_node_left_the_job_goes_back_into_the_queue(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, work="1", NODES_LEFT="node07", **SPARE)
    assert (code, cluster.requeued(), len(cluster.log("python"))) == (0, ["requeue 123456"], 1)
    assert "SLURM took a node from the job, and node07 is not enough" in output


@pytest.mark.parametrize("failure, left", [("3", "node07,node09"), ("137", "node07,node08,node09")])
def test_a_failure_of_the_run_itself_is_not_started_again(cluster, failure, left):
    code, output = cluster.run("train.sbatch", *TRAIN, work=failure, NODES_LEFT=left, **SPARE)
    assert (code, len(cluster.log("python")), cluster.requeued()) == (int(failure), 1, []), output


def test_srun_can_start_every_process(cluster):
    code, output = cluster.run("train.sbatch", *TRAIN, work="0", SLM_LAUNCH="srun")
    assert code == 0, output
    assert cluster.log("srun")[1].startswith(
        "--nodes=2 --nodelist=node07,node08 --ntasks=16 --ntasks-per-node=8 --distribution=block "
        "--cpus-per-task=8 --kill-on-bad-exit=1 bash -c"
    )
    assert cluster.log("python")[0].endswith(
        "processes.py --slurm-task -m megatron_slm.train --config recipe with spaces.yaml "
        "--selection.keep_fraction 0.6"
    )


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("SLM_LAUNCH", "mpirun", "SLM_LAUNCH: got 'mpirun'; expected torchrun or srun"),
        ("SLM_NODES", "3", "SLM_NODES: got '3'; expected a number of nodes up to 2"),
        ("SLM_MAX_REQUEUES", "many", "SLM_MAX_REQUEUES: got 'many'; expected a number of starts"),
    ],
)
def test_a_setting_of_env_sh_that_means_nothing_is_refused(cluster, name, value, sentence):
    code, output = cluster.run("train.sbatch", *TRAIN, work="0", **{name: value})
    assert (code, sentence in output, cluster.log("srun")) == (2, True, []), output


def test_containers_start_the_check_and_the_processes(cluster):
    """pyxis takes options of srun; apptainer is a command.

    Both stand-ins start what they are given.
    """
    apptainer = cluster.folder / "bin" / "apptainer"
    apptainer.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$*" >> "$SCRATCH/apptainer.log"\nshift 3\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    own = cluster.folder / "own_env.sh"
    own.write_text(
        "SLM_SRUN_OPTIONS=(--container-image=/shared/slm.sqsh --container-mounts=/shared:/shared)\n"
        "SLM_CONTAINER=(apptainer exec --nv /shared/slm.sif)\n"
        'source "$SLM_ROOT/launch/env.sh"\n'
    )
    code, output = cluster.run("train.sbatch", *TRAIN, work="3", SLM_ENV=str(own))
    assert code == 3, output
    image = "--container-image=/shared/slm.sqsh --container-mounts=/shared:/shared"
    assert [f" {image} apptainer exec" in step for step in cluster.log("srun") if "--n" in step]
    started = cluster.log("apptainer")
    assert started[0].startswith("exec --nv /shared/slm.sif python -m megatron_slm.train --config")
    assert started[1].startswith("exec --nv /shared/slm.sif bash -c exec python")


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


def test_a_program_s_exit_code_is_the_job_s_and_success_leaves_its_mark(cluster):
    mark = cluster.folder / "the mark"
    wanted = {"SLM_DONE_FILE": str(mark), "SLM_DONE_KEY": "abc", "SLURM_JOB_NUM_NODES": "1"}
    code, output = cluster.run("program.sbatch", "bash", "-c", "exit 3", work="0", **wanted)
    assert (code, mark.exists()) == (3, False), output
    code, output = cluster.run("program.sbatch", "echo", "two  words", work="0", **wanted)
    assert (code, mark.read_text()) == (0, "abc\n"), output
    assert "two  words" in output
    assert cluster.log("srun")[-1] == "--nodes=1 --ntasks=1 --cpus-per-task=64 echo two  words"
