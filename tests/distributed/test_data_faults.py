"""A file that one rank can no longer read: all ranks end together, with its name and a
checkpoint.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from megatron_slm.data.manifest import check_corpus
from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed.test_resume import CASES, VOCABULARY, Tokenizer, make_config, start

CASE = CASES["fp32, own loss"]
CUT_AT_STEP = 3


def train_until_a_file_is_cut(groups, folder: Path, cut: str):
    """Every rank reads copies of its own; `cut` is cut short on rank 1 after a few steps.

    Returns the words of the fault, the last step and the saved one.
    """
    from megatron_slm.data.corpora import open_corpora
    from megatron_slm.training.data_fault import DataFault
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs
    from megatron_slm.training.signals import CHECK_STEPS

    mine = folder / f"rank{groups.world_rank}"
    for name in ("train", "target"):
        write_corpus(
            mine / name,
            random_documents(40, 30, vocabulary_size=VOCABULARY),
            vocabulary_size=VOCABULARY,
        )
    corpora = open_corpora([str(mine / "train"), str(mine / "target")])
    config = make_config(folder, f"run_{cut}", CASE, groups.dp_size)
    config.checkpoint.interval_steps = 0
    config.checkpoint.keep_best = 0
    config.schedule.train_steps = 4 * CHECK_STEPS  # further than what is read ahead
    run_inputs = RunInputs(Tokenizer(), corpora[:1], {"target": corpora[1]}, VOCABULARY)
    run = TrainingRun(config, groups, run_inputs)
    run.start()
    hand_out = run.loader.next_step

    def next_step():
        if groups.world_rank == 1 and run.step == CUT_AT_STEP - 1:
            os.truncate(mine / f"{cut}.bin", 10)
        return hand_out()

    run.loader.next_step = next_step
    with pytest.raises(DataFault) as caught:
        run.run()
    return str(caught.value), run.step, run.store.saved_step


def train_until_the_disk_lies(groups, folder: Path) -> tuple[str, int, int]:
    """A byte of the corpus changes in mid-run, and nothing in the file's size or times shows it.

    Returns the words of the fault, the last step and the saved one.
    """
    from megatron_slm.training.data_fault import DataFault

    prefix = folder / "text"
    if groups.world_rank == 0:
        documents = random_documents(40, 30, vocabulary_size=VOCABULARY)
        write_corpus(prefix, documents, vocabulary_size=VOCABULARY)
        check_corpus(prefix)
    torch.distributed.barrier()
    config = make_config(folder, "run", CASE, groups.dp_size)
    config.checkpoint.interval_steps = 0
    config.checkpoint.keep_best = 0
    config.data.check_interval_seconds = 1
    run = start(groups, config, [str(prefix)])
    hand_out = run.loader.next_step

    def next_step():
        if groups.world_rank == 1 and run.step == CUT_AT_STEP - 1:
            flip_a_byte(Path(f"{prefix}.bin"))
            while run.stored_data.fault() is None:
                time.sleep(0.05)
        return hand_out()

    run.loader.next_step = next_step
    with pytest.raises(DataFault) as caught:
        run.run()
    return str(caught.value), run.step, run.store.saved_step


def flip_a_byte(path: Path) -> None:
    before = path.stat()
    with open(path, "r+b") as stream:
        byte = stream.read(1)
        stream.seek(0)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def train_on_nothing(groups, folder: Path) -> None:
    """A run whose corpora have no document of more than one token, which `train` would refuse."""
    from megatron_slm.data.corpora import open_corpora
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs

    mine = folder / f"rank{groups.world_rank}"
    write_corpus(mine / "lone", [[token % 50] for token in range(900)], vocabulary_size=VOCABULARY)
    config = make_config(folder, "run", {**CASE, "scorer": "none"}, groups.dp_size)
    config.data.validation = []
    config.checkpoint.keep_best = 0
    lone = open_corpora([str(mine / "lone")])
    run_inputs = RunInputs(Tokenizer(), lone, {"lone": lone[0]}, VOCABULARY)
    run = TrainingRun(config, groups, run_inputs)
    run.start()
    assert run.run() == 0


def meet_all_faults(groups, folder: Path):
    train_on_nothing(groups, folder / "nothing")
    cut = [train_until_a_file_is_cut(groups, folder / cut, cut) for cut in ("train", "target")]
    return [*cut, train_until_the_disk_lies(groups, folder / "lies")]


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return folder, *run_on_cpu(meet_all_faults, folder, dp=2)


def test_every_rank_ends_with_the_name_of_the_file_that_one_cannot_read(met):
    _, ours, theirs = met
    for cut, (words, step, saved), told_on_rank_1 in zip(
        ("train", "target"), ours[:2], theirs[:2], strict=True
    ):
        assert f"rank1/{cut}.bin: the file was cut short while it was in use" in words
        assert "(process 1 on " in words
        assert saved == step >= CUT_AT_STEP, "what was trained before is in a checkpoint"
        assert told_on_rank_1 == (words, step, saved)


def test_bytes_that_the_disk_has_changed_are_found_while_the_run_trains(met):
    folder, ours, theirs = met
    words, step, saved = ours[2]
    assert f"{folder}/lies/text.bin: bytes 0 to " in words
    assert "the disk has lost them" in words
    assert saved == step >= CUT_AT_STEP, "what was trained before is in a checkpoint"
    assert theirs[2] == ours[2]


def test_a_step_that_trains_nothing_is_a_warning_once(met):
    lines = (met[0] / "nothing" / "run" / "warnings.jsonl").read_text().splitlines()
    warnings = [json.loads(line)["text"] for line in lines]
    assert len([text for text in warnings if "The gradient of step 1 is zero" in text]) == 1
    assert not any("The gradient of step 2" in text for text in warnings)


def test_a_validation_in_which_nothing_counts_has_no_loss_and_says_so_once(met):
    run = met[0] / "nothing" / "run"
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [each for each in found if each["kind"] == "validation"]
    assert len(validations) > 1
    for each in validations:
        assert each["validation/lone/tokens"] == 0
        assert "validation/lone/loss" not in each
    warnings = [
        json.loads(line)["text"] for line in (run / "warnings.jsonl").read_text().splitlines()
    ]
    assert len([text for text in warnings if "validation on lone has no loss" in text]) == 1
