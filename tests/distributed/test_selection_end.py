"""selection.end_when_overtaken: from the log line in which the model has overtaken its reference, a
run trains on every token, in one process, over data-parallel ranks and over pipeline stages, and
after a resume.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from megatron_slm.config.schema import Config
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.bench import cut_back

if TYPE_CHECKING:
    from megatron_slm.training.trainer import Trainer

STEPS = 6
LOG_INTERVAL = 2
STOP = 4
SEQUENCES = 8
LENGTH = 16
VOCABULARY = 60
LAYOUTS = {"single": {}, "dp2": dict(dp=2), "pp2": dict(pp=2)}
# global_batch: every pipeline stage runs a forward pass first, for as long as tokens are selected.
SCOPES = {
    "single": ("data_parallel", "global_batch"),
    "dp2": ("data_parallel",),
    "pp2": ("global_batch",),
}
"""Of runs that are compared with a schedule; their choice does not depend on the steps before."""
RUNNING = "running_threshold"
RESUMED_IN = "dp2"
ONLINE_IN = "pp2"
ONLINE = "online reference"


def make_config(groups, folder: Path, run: str, scope: str = "data_parallel") -> Config:
    config = Config()
    config.run.folder = str(folder / run)
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        attention_heads=2,
        pad_vocabulary_to_multiple_of=64,
    )
    config.parallel = dataclasses.replace(
        config.parallel, tensor=groups.tp_size, pipeline=groups.pp_size
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=4 // groups.dp_size,
        tokenizer="none",
    )
    config.selection = dataclasses.replace(config.selection, scorer="excess_loss", scope=scope)
    config.selection.reference.scores = [str(folder / "scores")]
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    config.checkpoint = dataclasses.replace(config.checkpoint, interval_steps=2, keep_last=0)
    config.monitoring.log_interval_steps = LOG_INTERVAL
    config.monitoring.wandb.mode = "disabled"
    return config


def train(groups, folder: Path, config: Config) -> "Trainer":
    """A whole start of a run, new, or resumed from what its folder holds; its trainer."""
    from megatron_slm.data.scored_dataset import open_corpora
    from megatron_slm.parallel import seed_everything
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs

    corpora = open_corpora([str(folder / "corpus")], config.selection.reference.scores)
    seed_everything(config.run.seed, groups)
    run = TrainingRun(
        config, groups, RunInputs(SimpleNamespace(piece=str), corpora, {}, VOCABULARY)
    )
    run.start()
    assert run.run() == 0
    return run.trainer


def selects_until(config: Config, tokens: int) -> None:
    """The same choice in the steps before `tokens`, and every token from there, by a schedule."""
    config.selection.keep_fraction = {
        "style": "linear",
        "start": 0.6,
        "end": 1.0,
        "hold_tokens": tokens - 1,
        "tokens": 1,
    }


def run_all(groups, layout: str, shared: Path) -> None:
    import torch.distributed as dist

    folder = shared / layout
    for scope in SCOPES[layout]:
        train_to_the_end(groups, folder, scope)
        config = make_config(groups, folder, f"{scope}, scheduled", scope)
        selects_until(config, LOG_INTERVAL * SEQUENCES * LENGTH)
        train(groups, folder, config)
    if layout == RESUMED_IN:
        train_to_the_end(groups, folder, RUNNING)
        config = make_config(groups, folder, f"{RUNNING}, resumed", RUNNING)
        config.selection.end_when_overtaken = True
        dist.barrier()
        if groups.world_rank == 0:
            cut_back(folder / f"{RUNNING}, ended", folder / f"{RUNNING}, resumed", STOP)
        dist.barrier()
        train(groups, folder, config)
    if layout == ONLINE_IN:
        select_with_an_online_reference(groups, folder)


def train_to_the_end(groups, folder: Path, scope: str) -> None:
    """A run whose first log line shows that the reference is overtaken."""
    config = make_config(groups, folder, f"{scope}, ended", scope)
    config.selection.end_when_overtaken = True
    trainer = train(groups, folder, config)
    assert trainer.selector.ended_at_tokens == LOG_INTERVAL * SEQUENCES * LENGTH


def select_with_an_online_reference(groups, folder: Path) -> None:
    """The reference is the model after one step, which two more steps overtake."""
    config = make_config(groups, folder, "reference")
    config.selection.scorer = "none"
    config.schedule.train_steps = 1
    train(groups, folder, config)
    config = make_config(groups, folder, ONLINE)
    config.selection.reference.scores = []
    config.selection.reference.checkpoint = str(folder / "reference" / "checkpoints")
    config.selection.end_when_overtaken = True
    trainer = train(groups, folder, config)
    assert trainer.selector.ended_at_tokens is not None
    assert trainer.reference is None, "it costs memory and a forward pass"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shared = tmp_path_factory.mktemp("ends")
    for layout in LAYOUTS:
        folder = shared / layout
        folder.mkdir()
        documents = random_documents(60, 20, vocabulary_size=VOCABULARY, seed=0)
        write_corpus(folder / "corpus", documents, vocabulary_size=VOCABULARY)
        # Above every loss of a new model, which is about ln 60 = 4.1 nats.
        write_scores(folder / "scores", folder / "corpus", lambda offsets: 6.0 + np.sin(offsets))
    run_layouts_on_cpu(run_all, LAYOUTS, shared, side_by_side=True)
    return shared


def records(run: Path) -> list[dict]:
    """The log lines of a run, without what depends on time."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [without_times(line) for line in lines if line["kind"] == "train"]


def without_times(line: dict) -> dict:
    return {name: value for name, value in line.items() if "throughput/" not in name}


@pytest.mark.parametrize(
    ("layout", "scope"), [(layout, scope) for layout in LAYOUTS for scope in SCOPES[layout]]
)
def test_every_token_is_trained_on_from_the_log_line_that_shows_it(layout, scope, folder):
    ended, scheduled = (
        records(folder / layout / f"{scope}, {name}") for name in ("ended", "scheduled")
    )
    assert [line["step"] for line in ended] == [2, 4, 6]
    assert ended[0] == scheduled[0]
    assert ended[0]["loss/all"] <= ended[0]["loss/reference"]
    assert ended[0]["selection/kept_fraction"] < 0.65
    for line, expected in zip(ended[1:], scheduled[1:], strict=True):
        for name in ("loss/all", "loss/selected", "optimizer/grad_norm", "tokens/selected"):
            assert line[name] == pytest.approx(expected[name], rel=1e-6), (line["step"], name)


def test_a_resumed_run_does_not_select_again(folder):
    ended, resumed = (
        records(folder / RESUMED_IN / f"{RUNNING}, {name}") for name in ("ended", "resumed")
    )
    assert resumed == ended
    assert [line["selection/kept_fraction"] for line in ended[1:]] == [1.0, 1.0]
    said = (folder / RESUMED_IN / f"{RUNNING}, resumed" / "warnings.jsonl").read_text()
    assert f"The selection ended after {LOG_INTERVAL * SEQUENCES * LENGTH} tokens" in said


@pytest.mark.parametrize(
    ("layout", "run"), [("single", "data_parallel, ended"), (ONLINE_IN, ONLINE)]
)
def test_the_run_says_that_its_selection_has_ended(layout, run, folder):
    text = (folder / layout / run / "warnings.jsonl").read_text()
    assert text.count("The selection has ended after step") == 1
    assert text.count("The model has overtaken the reference") == 1
