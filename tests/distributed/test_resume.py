"""A run that stopped and went on is the run that never stopped: bit for bit in its layout, within
rounding in another.
"""

import dataclasses
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_slm.config.schema import Config, CorpusConfig
from megatron_slm.files.inert_pickle import UnsafeFile
from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.bench import cut_back
from tests.end_to_end.planted import plant

STEPS = 8
STOP = 4
VOCABULARY = 60
LENGTH = 16

# Each has state of its own beside weights and moments: random numbers; a threshold that moves, fp32
# main weights, retention; nothing.
CASES = {
    "fp32, dropout": dict(
        precision="fp32", scorer="none", scope="data_parallel", dropout=0.1, asynchronous=False
    ),
    "bf16, running threshold": dict(
        precision="bf16",
        scorer="own_loss",
        scope="running_threshold",
        dropout=0.0,
        asynchronous=True,
    ),
    "fp32, own loss": dict(
        precision="fp32", scorer="own_loss", scope="data_parallel", dropout=0.0, asynchronous=False
    ),
}
ANOTHER_LAYOUT = "fp32, own loss"


class Tokenizer:
    def piece(self, token: int) -> str:
        return str(token)


def make_config(folder: Path, run: str, case: dict, dp_size: int) -> Config:
    config = Config()
    config.run.folder = str(folder / run)
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        attention_heads=2,
        pad_vocabulary_to_multiple_of=64,
        dropout=case["dropout"],
    )
    config.parallel.distributed_optimizer = True
    config.device.precision = case["precision"]
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=8,
        micro_batch_size=4 // dp_size,
        tokenizer="none",
        validation=[CorpusConfig("target", str(folder / "corpus"))],
    )
    config.selection.scorer = case["scorer"]
    config.selection.scope = case["scope"]
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    config.checkpoint = dataclasses.replace(
        config.checkpoint,
        interval_steps=2,
        keep_last=0,
        keep_best=1,
        asynchronous=case["asynchronous"],
    )
    config.monitoring = dataclasses.replace(
        config.monitoring, log_interval_steps=3, validation_interval_steps=3, validation_batches=1
    )
    config.monitoring.wandb.mode = "disabled"
    return config


def train(groups, folder: Path, run: str, case: dict, save_optimizer: bool = True) -> int:
    """A whole start of a run, new, or resumed from what its folder holds; its exit code."""
    config = make_config(folder, run, case, groups.dp_size)
    config.checkpoint.save_optimizer = save_optimizer
    return start(groups, config, [str(folder / "corpus")]).run()


def start(groups, config: Config, prefixes: list[str]):
    """A run that is ready for its next step."""
    from megatron_slm.data.scored_dataset import open_corpora
    from megatron_slm.parallel import seed_everything
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs

    corpora = open_corpora(prefixes)
    seed_everything(config.run.seed, groups)
    run = TrainingRun(
        config, groups, RunInputs(Tokenizer(), corpora, {"target": corpora[0]}, VOCABULARY)
    )
    run.start()
    return run


def cut_to_stop(folder: Path, whole: str, run: str) -> None:
    """Make `run` the run folder of `whole` as a kill after step STOP would have left it: nothing
    newer, and no file beside its checkpoint to lean on.
    """
    cut_back(folder / whole, folder / run, STOP)
    (folder / run / "wandb_run_id").unlink()


def interrupt_and_compare(groups, layout: str, folder: Path) -> None:
    import torch.distributed as dist

    for case_name, case in CASES.items():
        if groups.dp_size == 1 and case_name != ANOTHER_LAYOUT:
            continue
        if groups.dp_size == 2:
            assert train(groups, folder, f"{case_name}, whole", case) == 0
        run = f"{case_name}, resumed by {groups.dp_size}"
        dist.barrier()  # the last rank writes the token view, maybe after rank 0 is done
        if groups.world_rank == 0:
            cut_to_stop(folder, f"{case_name}, whole", run)
        dist.barrier()
        assert train(groups, folder, run, case) == 0
    if groups.dp_size == 2:
        refuse_code_in_random_states(groups, folder, CASES[ANOTHER_LAYOUT])
    if groups.dp_size == 1:
        stop_where_nothing_can_be_saved(groups, folder / "full disk", CASES[ANOTHER_LAYOUT])
        stop_and_end_with_weights_only(groups, folder / "weights only", CASES[ANOTHER_LAYOUT])
        open_sinks_that_draw(groups, folder)
    go_on_with_changes(groups, folder)


def open_sinks_that_draw(groups, folder: Path) -> None:
    """What writes the log may import libraries that draw from Python's generator, as rich does
    once.
    """
    from megatron_slm.training import loop

    plain = loop.Reporter

    loop.Reporter = lambda *words, **named: random.random() and plain(*words, **named)
    try:
        config = make_config(folder, "drawing", CASES[ANOTHER_LAYOUT], groups.dp_size)
        run = start(groups, config, [str(folder / "corpus")])
    finally:
        loop.Reporter = plain
    state = random.getstate()
    random.seed(config.run.seed)
    assert random.getstate() == state, "the state with which the run was seeded"
    run.reporter.close("stopped", 85)


def go_on_with_changes(groups, folder: Path) -> None:
    """A run of tokens: 2 steps of 8 x 16 (a third is lost, in the middle of a logged interval), 2
    more with a second corpus; by one process 4 of 4 x 16, then 4 of 4 x 8.
    """
    import torch.distributed as dist

    one = [str(folder / "corpus")]
    both = [str(folder / "other"), str(folder / "corpus")]

    def settings(tokens: int, batch: int, length: int = LENGTH) -> Config:
        config = make_config(folder, "changed", CASES[ANOTHER_LAYOUT], groups.dp_size)
        config.schedule.train_steps = 0
        config.schedule.train_tokens = tokens
        config.data.global_batch_size = batch
        config.data.sequence_length = length
        config.data.index_cache = str(folder / "indices")  # so nothing else makes the run folder
        return config

    if groups.dp_size == 2:
        assert start(groups, settings(384, 8), one).run() == 0
        if groups.world_rank == 0:
            shutil.rmtree(folder / "changed" / "checkpoints" / "step_00000003")
        dist.barrier()
        run = start(groups, settings(512, 8), both)
        kept = run.metrics.state_dict()["sums"]
        assert "selection/by_position" in kept
        assert "selection/by_corpus" not in kept, "sums of corpora that have other numbers now"
        read_on(run.loader, folder)
        assert run.run() == 0
        return
    assert start(groups, settings(768, 4), both).run() == 0
    assert start(groups, settings(896, 4, 8), both).run() == 0
    with pytest.raises(ValueError, match="train_tokens: got 768, but the run .* has done 12 steps"):
        start(groups, settings(768, 4, 8), both)
    with pytest.raises(ValueError, match="corpus: its content has changed"):
        for suffix in (".bin", ".idx", ".manifest.json"):
            shutil.copy(f"{both[0]}{suffix}", f"{both[1]}{suffix}")
        start(groups, settings(999, 4, 8), both)


def read_on(loader, folder: Path) -> None:
    """After 16 samples of the first corpus, the blend gives its 17th and the first of the other."""
    from megatron_slm.data.scored_dataset import open_corpora, training_dataset

    order = dict(sequence_length=LENGTH, seed=1234, samples=0)
    alone = [
        training_dataset(open_corpora([str(folder / name)]), **order)
        for name in ("other", "corpus")
    ]
    places = [0, 16]
    for index in range(loader.consumed_samples, loader.consumed_samples + 16):
        sample = loader.dataset[index]
        corpus = int(sample["corpus_id"])
        assert (sample["tokens"] == alone[corpus][places[corpus]]["tokens"]).all()
        places[corpus] += 1
    assert min(places) > 0
    assert places[1] > 16


def refuse_code_in_random_states(groups, folder: Path, case: dict) -> None:
    """The object is in one rank's file; both hear of it, and neither waits for the other."""
    import torch.distributed as dist

    run = folder / "planted"
    if groups.world_rank == 0:
        cut_to_stop(folder, f"{ANOTHER_LAYOUT}, whole", run.name)
        plant(run / "checkpoints" / f"step_{STOP:08d}", "random", folder / "its code ran")
    dist.barrier()
    with pytest.raises(UnsafeFile, match=r"^\S+.*\.distcp: refused, because it names posix.mkdir"):
        train(groups, folder, run.name, case)
    assert not (folder / "its code ran").exists()


def stop_where_nothing_can_be_saved(groups, run: Path, case: dict) -> None:
    """A run asked to stop while its disk is full did not stop "with a checkpoint", and says so."""
    from megatron_slm.training.ending import NotSaved

    run.mkdir()
    (run / "stop_requested").touch()
    with pytest.MonkeyPatch.context() as storage:
        storage.setattr(Path, "rename", full_disk)
        with pytest.raises(NotSaved, match="stopped on request after step 1 of 8.*from step 0"):
            train(groups, run.parent, run.name, case)
    assert not (run / "stop_requested").exists()
    warnings = [
        json.loads(line)["text"] for line in (run / "warnings.jsonl").read_text().splitlines()
    ]
    assert any("could not be saved" in text for text in warnings)
    assert not any("stopped on request" in text for text in warnings)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop_and_end_with_weights_only(groups, run: Path, case: dict) -> None:
    """Without optimizer state in its checkpoints: a run that is asked to stop goes on all the same,
    and one that ended says why it cannot.
    """
    run.mkdir()
    (run / "stop_requested").touch()
    assert train(groups, run.parent, run.name, case, save_optimizer=False) == 85
    assert train(groups, run.parent, run.name, case, save_optimizer=False) == 0
    with pytest.raises(
        ValueError, match=r"step_00000008 holds weights only .* checkpoint.initialize_from"
    ):
        train(groups, run.parent, run.name, case, save_optimizer=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for seed, name in enumerate(("corpus", "other")):
        documents = random_documents(60, 20, vocabulary_size=VOCABULARY, seed=seed)
        write_corpus(folder / name, documents, vocabulary_size=VOCABULARY)
    run_layouts_on_cpu(interrupt_and_compare, {"two": dict(dp=2), "one": dict(dp=1)}, folder)
    return folder


def records(run: Path) -> list[dict]:
    """Every line of the metrics, without its times."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line).items()
        records.append({name: value for name, value in values if "throughput/" not in name})
    return records


@pytest.mark.parametrize("name", CASES)
def test_the_same_layout_continues_bit_for_bit(name, folder):
    """Weights, moments and random states (one fingerprint over all of them), data position,
    thresholds, metrics, W&B run and best checkpoint.
    """
    from megatron_slm.checkpoint.folder import read_checkpoint_info, resolve_checkpoint, step_folder

    whole = folder / f"{name}, whole"
    resumed = folder / f"{name}, resumed by 2"
    assert records(resumed) == records(whole)
    for step in (STOP + 2, STEPS):
        a, b = (step_folder(run / "checkpoints", step) for run in (whole, resumed))
        assert read_checkpoint_info(a) == read_checkpoint_info(b)
        assert (a / "trainer.json").read_bytes() == (b / "trainer.json").read_bytes()
    trainer = json.loads((step_folder(resumed / "checkpoints", STEPS) / "trainer.json").read_text())
    assert trainer["samples"] == trainer["data"]["samples"] == STEPS * 8
    assert len(trainer["wandb_id"]) == 8
    assert (trainer["selection"]["running"] is not None) == ("threshold" in name)
    assert (
        resolve_checkpoint(resumed / "checkpoints" / "best").name
        == resolve_checkpoint(whole / "checkpoints" / "best").name
    )


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(folder):
    """Checkpoints every 2 steps and validations every 3: each checkpoint is validated at its own
    step.
    """
    from megatron_slm.checkpoint.folder import (
        complete_checkpoints,
        read_checkpoint_info,
        resolve_checkpoint,
        step_of,
    )

    run = folder / f"{ANOTHER_LAYOUT}, whole"
    measured = {
        record["step"]: record["validation/target/loss"]
        for record in records(run)
        if record["kind"] == "validation"
    }
    assert sorted(measured) == [0, 2, 3, 4, 6, 8]
    saved = {
        step_of(path): read_checkpoint_info(path).validation_loss["target"]
        for path in complete_checkpoints(run / "checkpoints")
    }
    assert saved == {step: measured[step] for step in (2, 4, 6, 8)}
    assert step_of(resolve_checkpoint(run / "checkpoints" / "best")) == min(saved, key=saved.get)


def test_another_data_parallel_size_continues_within_rounding_with_the_same_samples(folder):
    whole = records(folder / f"{ANOTHER_LAYOUT}, whole")
    resumed = records(folder / f"{ANOTHER_LAYOUT}, resumed by 1")
    for ours, theirs in zip(resumed, whole, strict=True):
        for name in ("kind", "step", "tokens/processed"):
            assert ours[name] == theirs[name]
        for name in (
            "loss/all",
            "loss/selected",
            "optimizer/grad_norm",
            "validation/target/loss",
            "tokens/selected",
        ):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (
                    f"{name} of step {ours['step']}"
                )


def test_a_run_with_another_batch_length_blend_and_layout_counts_what_it_reads(folder):
    run = folder / "changed"
    trained = {
        line["step"]: line["tokens/processed"] for line in records(run) if line["kind"] == "train"
    }
    assert trained == {
        3: 384,
        4: 512,
        6: 640,
        8: 768,
        9: 800,
        12: 896,
    }
    last = run / "checkpoints" / "step_00000012"
    assert json.loads((last / "model.json").read_text())["tokens_processed"] == 896
    trainer = json.loads((last / "trainer.json").read_text())
    assert (trainer["samples"], trainer["data"]["samples"]) == (64, 16)
    corpora = sorted(trainer["data"]["corpora"], key=lambda corpus: corpus["prefix"])
    assert [Path(corpus["prefix"]).name for corpus in corpora] == ["corpus", "other"]
    [past], [past_of_other] = (corpus["past"] for corpus in corpora)
    assert past["sequence_length"] == past_of_other["sequence_length"] == 16
    assert past["samples"] + past_of_other["samples"] == 48


def test_what_has_changed_between_two_starts_is_told_by_the_rank_that_logs(folder):
    """The settings are compared by the first rank and written by the last."""
    lines = (folder / "changed" / "warnings.jsonl").read_text().splitlines()
    warnings = [json.loads(line)["text"] for line in lines]
    assert "schedule.train_tokens was 384 when this run started, and is 512 now" in warnings
    assert (
        f"data.train: {folder / 'other'} is new in this run and is read from its beginning"
        in warnings
    )
    assert any(
        "what is left of the present epoch of each corpus is cut anew" in text for text in warnings
    )
