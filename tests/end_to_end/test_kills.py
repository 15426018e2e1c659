"""kill -9 at every bad moment of a run of two processes, the first time under torchrun: it goes on
from its last good checkpoint with the uninterrupted losses.

Random moments: tests/distributed/test_random_kills.py.
"""

import subprocess
from pathlib import Path

import pytest

from megatron_slm.checkpoint.folder import complete_checkpoints, damaged_files, step_of
from tests.end_to_end.small_run import (
    ROOT,
    STEPS,
    command,
    compared,
    environment,
    settings_of,
)
from tests.end_to_end.warm_programs import run_program

# Each start of the run dies at its place, the next goes on:
# (place, step, rank), asynchronous saves, the newest checkpoint afterwards.
DEATHS = [
    (("step", 2, "1"), False, None),
    (("save", 3, "all"), False, None),
    (("pointer", 3, "0"), True, 3),
    (("rename", 6, "0"), False, 3),
    (("save", 6, "1"), True, 3),
    (("step", 8, "all"), True, 6),
]
SETTINGS = ["--device.precision", "bf16"]  # with fp32 main weights to restore


def newest(run: Path) -> int | None:
    """Step of the newest checkpoint, which must be whole, as must be the one `latest` names."""
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        return None
    named = (
        run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
        if (run / "checkpoints" / "latest").exists()
        else found[-1]
    )
    assert damaged_files(found[-1]) == []
    assert named in found
    assert damaged_files(named) == []
    return step_of(found[-1])


def run_to_end(corpus: Path, run: Path) -> str:
    """What a start says that nothing kills."""
    done = run_program("megatron_slm.train", *settings_of(corpus, run, *SETTINGS), processes=2)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_to_end(corpus, run)
    return run


def die_under_torchrun(corpus: Path, run: Path, settings: list[str], variables: dict) -> None:
    done = subprocess.run(
        command(corpus, run, *settings, module="tests.end_to_end.dying_train"),
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = f"did not die: {variables}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    assert done.returncode != 0, said
    assert "Signal 9 (SIGKILL)" in done.stderr, said


def die(corpus: Path, run: Path, settings: list[str], variables: dict) -> None:
    words = settings_of(corpus, run, *settings)
    program = "tests.end_to_end.dying_train"
    run_program(program, *words, processes=2, exit_code=-9, variables=variables)


def test_a_killed_run_continues_with_the_uninterrupted_losses(corpus, whole, tmp_path):
    run = tmp_path / "killed"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    start = die_under_torchrun
    for death, asynchronous, expected in DEATHS:
        words = ":".join(map(str, death))
        settings = [*SETTINGS, "--checkpoint.asynchronous", str(asynchronous).lower()]
        start(corpus, run, settings, {"SLM_TEST_DEATH": words, "TMPDIR": str(temporary)})
        assert newest(run) == expected, words
        start = die
    assert [path.name for path in temporary.iterdir() if "wandb" in path.name] == []
    output = run_to_end(corpus, run)
    assert f"resumed after step {DEATHS[-1][-1]}" in output
    assert compared(run) == compared(whole)
    assert newest(run) == STEPS
    assert not list((run / "checkpoints").glob(".*"))
