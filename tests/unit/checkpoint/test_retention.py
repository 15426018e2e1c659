"""Which checkpoints stay: the newest, every n-th, and the best by validation loss."""

import math

import pytest

from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    complete,
    complete_checkpoints,
    resolve_checkpoint,
    step_folder,
    step_of,
    writing_folder,
)
from megatron_slm.checkpoint.retention import Retention, by_validation_loss, remove_old


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "checkpoints"


def save(checkpoints, step: int, **validation_loss):
    writing_folder(checkpoints, step).mkdir(parents=True)
    return complete(
        checkpoints,
        step,
        CheckpointInfo({}, 64, {}, step, 0, validation_loss=validation_loss),
        {},
        {},
    )


def steps(checkpoints) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(checkpoints)]


@pytest.mark.parametrize(
    "keep_last, keep_every, best, left",
    [
        (0, 0, set(), [10, 20, 30, 40, 50]),
        (2, 0, set(), [40, 50]),
        (1, 20, set(), [20, 40, 50]),
        (2, 30, {10}, [10, 30, 40, 50]),
        (9, 0, set(), [10, 20, 30, 40, 50]),
    ],
)
def test_remove_old(checkpoints, keep_last, keep_every, best, left):
    for step in (10, 20, 30, 40, 50):
        save(checkpoints, step)
    removed = remove_old(checkpoints, keep_last, keep_every, best)
    assert [step_of(path) for path in complete_checkpoints(checkpoints)] == left
    assert sorted(left + [step_of(path) for path in removed]) == [10, 20, 30, 40, 50]
    assert not list(checkpoints.glob(".removing_*"))


def test_the_best_stay_and_the_pointer_follows(checkpoints):
    retention = Retention(keep_last=1, keep_best=2, validation="target")
    pointed = []
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 1.9), (50, 2.6)):
        save(checkpoints, step, target=loss, other=-loss)
        retention.apply(checkpoints)
        pointed.append(step_of(resolve_checkpoint(checkpoints / "best")))
    assert steps(checkpoints) == [20, 40, 50]
    assert pointed == [10, 20, 20, 40, 40]
    assert not list(checkpoints.glob(".*"))


def test_what_was_not_validated_or_diverged_or_is_damaged_is_not_the_best(checkpoints):
    (
        save(checkpoints, 10, target=3.0),
        save(checkpoints, 20),
        save(checkpoints, 30, target=math.nan),
        save(checkpoints, 40, other=1.0),
        save(checkpoints, 50, target=1.0),
    )
    (step_folder(checkpoints, 50) / "model.json").write_bytes(b"\xff")
    save(checkpoints, 60, target=3.0)
    assert [step_of(path) for path in by_validation_loss(checkpoints, "target")] == [10, 60], (
        "of equal ones the older first"
    )


def test_the_pointer_goes_when_nothing_is_best_any_more(checkpoints):
    save(checkpoints, 10, target=3.0)
    Retention(keep_best=1, validation="target").apply(checkpoints)
    assert (checkpoints / "best").exists()
    Retention(keep_best=0).apply(checkpoints)
    assert not (checkpoints / "best").exists()
