"""Steps without a finite gradient, losses that jump, and checkpoints that cannot be written: what a
run does on two ranks that agree.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed.test_resume import CASES, STEPS, VOCABULARY, make_config, start

CASE = CASES["fp32, own loss"]


def weights_of(run) -> torch.Tensor:
    return torch.cat(
        [parameter.detach().flatten() for parameter in run.trainer.models[0].parameters()]
    )


def poison(run, steps: set[int], rank: int) -> None:
    """Make the gradients of these steps NaN on one rank, as a bad kernel or a bad number in the
    data would.
    """
    from megatron_slm.training import step as step_module

    plain = step_module.forward_backward

    def poisoned(models, *arguments, **named):
        reports = plain(models, *arguments, **named)
        if run.step + 1 in steps and run.groups.world_rank == rank:
            for model in models:
                model.buffers[0].grad_data.fill_(math.nan)
        return reports

    step_module.forward_backward = poisoned


def train_poisoned(groups, folder: Path, name: str, steps: set[int], allowed: int):
    """(how it ended, the weights before each step, the weights at the end)."""
    from megatron_slm.training import step as step_module
    from megatron_slm.training.ending import NonFiniteLoss

    plain = step_module.forward_backward
    config = make_config(folder, name, CASE, groups.dp_size)
    config.optimizer.max_non_finite_steps = allowed
    config.monitoring.log_interval_steps = 1
    run = start(groups, config, [str(folder / "corpus")])
    poison(run, steps, rank=1)
    before = {}
    hand_out = run.loader.next_step

    def next_step():
        before[run.step + 1] = weights_of(run)
        return hand_out()

    run.loader.next_step = next_step
    try:
        ended = run.run()
    except NonFiniteLoss as error:
        ended = str(error)
    finally:
        step_module.forward_backward = plain
        run.reporter.close("done", 0)
    return ended, before, weights_of(run)


def train_with_a_jump(groups, folder: Path):
    """One step of 26 is computed with weights that are far too large; a log line is two steps."""
    from megatron_slm.training import step as step_room

    plain = step_room.forward_backward
    config = make_config(folder, "jump", CASE, groups.dp_size)
    config.schedule.train_steps = 26
    config.monitoring.log_interval_steps = 2
    config.monitoring.validation_interval_steps = 0
    config.checkpoint.interval_steps = 0
    config.checkpoint.keep_best = 0
    run = start(groups, config, [str(folder / "corpus")])

    def inflated(models, *arguments, **named):
        parameters = list(models[0].parameters()) if run.step + 1 == 23 else []
        for parameter in parameters:
            parameter.data.mul_(30)
        reports = plain(models, *arguments, **named)
        for parameter in parameters:
            parameter.data.div_(30)
        return reports

    step_room.forward_backward = inflated
    try:
        assert run.run() == 0
    finally:
        step_room.forward_backward = plain
        run.reporter.close("done", 0)


def train_without_checkpoints(groups, folder: Path):
    """A run whose checkpoint folder is a file; (how it ended, its last step)."""
    from megatron_slm.training.ending import NotSaved

    config = make_config(folder, "unsaved", CASE, groups.dp_size)
    config.checkpoint.interval_steps = 1
    config.checkpoint.keep_best = 0
    run = start(groups, config, [str(folder / "corpus")])
    if groups.world_rank == 0:
        (Path(config.run.folder) / "checkpoints").write_text("in the way")
    torch.distributed.barrier()
    with pytest.raises(NotSaved) as caught:
        run.run()
    run.reporter.close("failed", 4)
    return str(caught.value), run.step


def every_fault(groups, folder: Path) -> dict:
    return {
        "skipped": train_poisoned(groups, folder, "skipped", {3, 5, 6}, allowed=2),
        "too many": train_poisoned(groups, folder, "too many", {3, 4}, allowed=1),
        "unsaved": train_without_checkpoints(groups, folder),
        "jump": train_with_a_jump(groups, folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def results(folder):
    documents = random_documents(40, 30, vocabulary_size=VOCABULARY)
    write_corpus(folder / "corpus", documents, vocabulary_size=VOCABULARY)
    return run_on_cpu(every_fault, folder, dp=2)


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_step_that_may_be_skipped_leaves_the_weights_alone(results):
    for rank in results:
        ended, before, last = rank["skipped"]
        assert ended == 0
        assert torch.equal(before[3], before[4])
        assert torch.equal(before[5], before[7])
        assert not torch.equal(before[4], before[5])
        assert last.isfinite().all()


def test_skipped_steps_are_counted_and_their_sums_left_out(results, folder):
    lines = [
        each for each in records(folder / "skipped", "metrics.jsonl") if each["kind"] == "train"
    ]
    assert [each.get("optimizer/skipped_steps", 0) for each in lines] == [0, 0, 1, 1, 2, 3, 3, 3]
    assert all(math.isfinite(each["loss/all"]) for each in lines if "loss/all" in each)
    assert [each["step"] for each in lines if "loss/all" not in each] == [3, 5, 6]
    warnings = [each["text"] for each in records(folder / "skipped", "warnings.jsonl")]
    assert [text for text in warnings if "the step is skipped (2 of at most 2 in a row" in text]


def test_one_step_too_many_ends_the_run_with_its_weights_unharmed(results):
    for rank in results:
        ended, before, last = rank["too many"]
        assert "the gradient norm of step 4 is nan: training diverged" in ended
        assert torch.equal(before[3], last)


def test_the_data_of_a_bad_step_are_written_down(results, folder):
    """Every sequence of the step once, with the documents and tokens it was made of."""
    written = sorted((folder / "too many" / "non_finite" / "step_00000003").iterdir())
    names = [path.name for path in written]
    assert names == ["data_parallel_rank_00000.json", "data_parallel_rank_00001.json"]
    sequences = [each for path in written for each in json.loads(path.read_text())]
    assert sorted(each["sample"] for each in sequences) == list(range(16, 24))
    for each in sequences:
        assert each["corpus"] == str(folder / "corpus")
        assert sum(end - begin for begin, end in each["token_ranges"]) == 17
        assert len(each["documents"]) == len(each["token_ranges"])
        assert each["columns"]["loss"]["not_finite"] == 0, (
            "the weights are whole, so are the losses"
        )
        assert 0 < each["columns"]["loss"]["mean"] < 10


def test_the_data_of_a_jump_are_those_of_the_step_with_the_largest_loss(results, folder):
    """The alarm comes a step later, at the log line, when the batch is gone."""
    warnings = [each["text"] for each in records(folder / "jump", "warnings.jsonl")]
    [sentence] = [text for text in warnings if "jumped to" in text]
    where = folder / "jump" / "loss_spikes" / "step_00000023"
    assert "at step 24; the 11 log lines before" in sentence
    assert "Of the interval's steps, 23 had the largest loss" in sentence
    assert sentence.endswith(f"its data: {where}")
    assert [each.name for each in where.parent.iterdir()] == [where.name]
    losses = json.loads((where / "losses.json").read_text())
    assert [each["step"] for each in losses] == [23, 24]
    assert losses[0]["loss"] > losses[1]["loss"] + 1
    sequences = []
    for rank in (0, 1):
        sequences += json.loads((where / f"data_parallel_rank_{rank:05d}.json").read_text())
    first_sample = 22 * 8
    assert losses[0]["first_sample"] == first_sample
    assert sorted(each["sample"] for each in sequences) == list(
        range(first_sample, first_sample + 8)
    )


def test_checkpoints_that_fail_again_and_again_end_the_run(results):
    for rank in results:
        said, step = rank["unsaved"]
        assert "3 checkpoints in a row could not be saved, the last one at step 3" in said
        assert step == 3 < STEPS
