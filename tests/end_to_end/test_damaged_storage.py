"""A flipped byte and a full disk, through the trainer: the older checkpoint serves, training goes
on, and every sink is told.
"""

import shutil
import subprocess

import pytest

from megatron_slm.checkpoint.folder import complete_checkpoints, damaged_files, step_of
from tests.end_to_end.small_run import STEPS, compared, lines, train


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run that keeps all its checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(corpus, run, "--checkpoint.keep_last", "0")
    return run


def told_everywhere(run, output: str, *words: str) -> bool:
    """Whether console, warnings.jsonl and the offline W&B run all have a line with these words."""

    def has_them(line: str) -> bool:
        return all(word in line for word in words)

    errors = [line["text"] for line in lines(run, "warnings.jsonl") if line["level"] == "error"]
    of_wandb = [path.read_bytes() for path in (run / "wandb").rglob("*.wandb")]
    return (
        any(map(has_them, errors))
        and any(map(has_them, output.splitlines()))
        and any(has_them(content.decode(errors="replace")) for content in of_wandb)
    )


def test_a_flipped_byte_is_named_and_the_checkpoint_before_it_is_used(corpus, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    newest, before = (run / "checkpoints" / name for name in ("step_00000014", "step_00000012"))
    damaged = sorted(newest.glob("*.distcp"))[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    output = train(corpus, run, "--monitoring.wandb.mode", "offline")
    assert told_everywhere(run, output, damaged.name, "is damaged", newest.name)
    assert "resumed after step 12" in output
    assert compared(run) == compared(whole)
    assert damaged_files(newest) == []
    assert damaged_files(before) == []
    assert newest.with_name("step_00000014.damaged").is_dir()
    assert (run / "checkpoints" / "latest").read_text() == "step_00000014\n"


@pytest.fixture
def small_disk(tmp_path, whole):
    """A run that writes its checkpoints to a file system with room for one and a half."""
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step_00000003").iterdir())
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(checkpoints)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(
            "only root can mount a small file system; "
            "test_save_failures injects the same failure without one"
        )
    yield run
    subprocess.run(["umount", str(checkpoints)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_stops_no_training_and_costs_no_checkpoint(
    asynchronous, corpus, whole, small_disk
):
    output = train(
        corpus,
        small_disk,
        *("--checkpoint.asynchronous", asynchronous, "--checkpoint.max_failed_saves", "100"),
        *("--monitoring.wandb.mode", "offline"),
        exit_code=4,
    )
    assert "start the same command again: it goes on from step 3" in output
    assert told_everywhere(
        small_disk,
        output,
        "could not be saved",
        "No space left on device",
        "older checkpoints are intact",
    )
    assert compared(small_disk) == compared(whole), "the same losses to the last step"
    kept = complete_checkpoints(small_disk / "checkpoints")
    assert [step_of(path) for path in kept] == [3]
    assert damaged_files(kept[0]) == []
    assert (small_disk / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert max(line["step"] for line in lines(small_disk) if line["kind"] == "train") == STEPS
