"""Runs with parts from outside the library, and with and without the tools, on two processes.

The parts are the examples of docs/extending.md.
"""

from pathlib import Path

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed.test_resume import (
    CASES,
    STEPS,
    VOCABULARY,
    Tokenizer,
    make_config,
    records,
)
from tests.unit.training.test_outside_parts import config_with_examples

CASE = CASES["fp32, own loss"]
EXAMPLES = {
    "optimizer": ("kind",),
    "schedule": ("style",),
    "monitoring": ("sinks", "validations", "after_step"),
}


def config_of(folder: Path, run: str, dp_size: int) -> Config:
    config = make_config(folder, run, CASE, dp_size)
    config.monitoring.log_interval_steps = 1
    config.checkpoint.keep_best = 0
    return config


def train(groups, folder: Path, config: Config, parts=None) -> int:
    from megatron_slm.data.corpora import open_corpora
    from megatron_slm.parallel import seed_everything
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs

    corpora = open_corpora([str(folder / "corpus")])
    seed_everything(config.run.seed, groups)
    run_inputs = RunInputs(Tokenizer(), corpora, {"target": corpora[0]}, VOCABULARY)
    run = TrainingRun(config, groups, run_inputs, parts=parts)
    run.start()
    return run.run()


def train_with_examples(groups, folder: Path, run: str, stop_after: int = 0) -> list:
    """A run with every example of the guide; what its hook heard on this rank."""
    from dataclasses import replace

    from megatron_slm.training.outside_parts import load_outside_parts

    config = config_of(folder, run, groups.dp_size)
    examples = config_with_examples(folder)
    for section, fields in EXAMPLES.items():
        for field in fields:
            setattr(getattr(config, section), field, getattr(getattr(examples, section), field))
    config.optimizer.learning_rate = 1e-3
    heard = []

    def hook(step, metrics):
        heard.append((step, metrics))
        if step == stop_after and groups.world_rank == 0:
            (folder / run / "stop_requested").touch()

    code = train(groups, folder, config, replace(load_outside_parts(config), after_step=hook))
    assert code == (85 if stop_after else 0)
    return heard


def train_all(groups, folder: Path) -> dict:
    from megatron_slm.training import signals

    plain = config_of(folder, "plain", groups.dp_size)
    plain.device.garbage_collection_steps = 0
    plain.device.step_timeout_minutes = 0
    assert train(groups, folder, plain) == 0
    tools = config_of(folder, "tools", groups.dp_size)
    tools.device.garbage_collection_steps = 2
    tools.monitoring.profile_steps = [3, 4]
    tools.monitoring.memory_snapshot = True
    assert train(groups, folder, tools) == 0
    whole = train_with_examples(groups, folder, "whole")
    signals.CHECK_STEPS = 2  # so that a run of 8 steps hears of the request
    train_with_examples(groups, folder, "resumed", stop_after=3)
    return {"whole": whole, "resumed": train_with_examples(groups, folder, "resumed")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    documents = random_documents(60, 20, vocabulary_size=VOCABULARY)
    write_corpus(folder / "corpus", documents, vocabulary_size=VOCABULARY)
    return folder, run_on_cpu(train_all, folder, dp=2)


def test_tools_change_no_number(trained):
    folder, _ = trained
    assert records(folder / "tools") == records(folder / "plain")


def test_the_tools_did_their_work(trained):
    folder, _ = trained
    traces = sorted(path.name for path in (folder / "tools" / "profile").iterdir())
    assert traces == [f"rank_0000{rank}.steps_3_4.json.gz" for rank in (0, 1)]
    said = (folder / "tools" / "warnings.jsonl").read_text()
    assert "monitoring.memory_snapshot records nothing" in said


def test_parts_from_outside_are_used(trained):
    folder, _ = trained
    plain = records(folder / "plain")
    outside = records(folder / "whole")
    rates = [line["optimizer/learning_rate"] for line in outside if line["kind"] == "train"]
    assert rates[:2] == [pytest.approx(1e-3), pytest.approx(3e-5 + (1e-3 - 3e-5) / 2**0.5)]
    plain_losses = [line.get("loss/all") for line in plain]
    losses = [line.get("loss/all") for line in outside]
    assert losses[1] == plain_losses[1], "the same weights at first"
    assert losses != plain_losses
    late = [line["validation/target/late_loss"] for line in outside if line["kind"] != "train"]
    assert len(late) > 1
    assert all(loss > 0 for loss in late)
    written = (folder / "whole" / "losses.csv").read_text().splitlines()
    assert len(written) == len(outside)


def test_an_outside_optimizer_resumes_bit_for_bit(trained):
    folder, _ = trained
    assert records(folder / "resumed") == records(folder / "whole")


def test_every_rank_calls_the_hook_after_every_step(trained):
    _, ranks = trained
    for heard in ranks:
        assert [step for step, _ in heard["whole"]] == list(range(1, STEPS + 1))
        step, metrics = heard["whole"][-1]
        assert metrics["optimizer/grad_norm"] > 0
        assert metrics["tokens/processed"] == step * 8 * 16
        assert heard["resumed"], "the run stopped before its end, and went on"
