"""launch/local.sh, run by bash with stand-ins."""

import pytest

from tests.unit.launch.stand_ins import STOP_SIGNALS, TRAIN


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


@pytest.mark.parametrize("more", [[], ["--preflight"]])
def test_a_stop_file_is_left_to_the_check_which_locks_the_run_folder(cluster, more):
    """The script cannot tell one that a killed run left from a request to a run that lives."""
    cluster.run_folder.mkdir(parents=True)
    (cluster.run_folder / "stop_requested").touch()
    assert cluster.run("local.sh", "2", "train", *TRAIN, *more, work="0")[0] == 0
    assert (cluster.folder / "stop_file_seen").exists()


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


@pytest.mark.parametrize("program", ["train", "score", "evaluate"])
@pytest.mark.parametrize("code", [2, 3])
def test_what_is_refused_is_said_before_torchrun_starts(cluster, program, code):
    ended, output = cluster.run("local.sh", "2", program, *TRAIN, work="0", CHECKED=str(code))
    assert (ended, cluster.log("python")) == (code, []), output
    assert "WORLD_SIZE=2" in cluster.log("check")


def test_the_page_of_the_preflight_is_left_to_the_whole_job(cluster):
    code, output = cluster.run(
        "local.sh", "2", "train", *TRAIN, "--preflight", work="0", CHECKED="2"
    )
    assert code == 0, output
    assert cluster.log("python")[0].endswith("--preflight")


def test_local_usage_is_shown(cluster):
    code, output = cluster.run("local.sh", "train", work="0")
    assert code == 2
    assert "bash launch/local.sh 2 train" in output
