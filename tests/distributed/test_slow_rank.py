"""Two processes, one of which is slowed: the log says which and where, and does not blame the one
that waits.
"""

import json
import socket
import statistics
import time
from pathlib import Path

import pytest

from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed.test_resume import CASES, STEPS, VOCABULARY, make_config, start

CASE = CASES["fp32, own loss"]
SLEEP_SECONDS = 0.5


def slow_reading(run) -> None:
    """Whoever asks for the next step waits, however long the other rank's step takes."""
    reading = run.loader._reading

    def slowly():
        time.sleep(SLEEP_SECONDS)
        return reading()

    run.loader._reading = slowly


def slow_computing(run) -> None:
    model = run.trainer.models[0]
    model.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_SECONDS))


def train_slowed(groups, folder: Path, name: str, rank: int, slow) -> None:
    """A run in which `slow` has been done to one rank."""
    from megatron_slm.monitoring import slow_ranks

    # The run is short, and its ranks differ by no chance.
    slow_ranks.SLOW_SECONDS = 0.0
    slow_ranks.SLOW_INTERVALS = 3
    config = make_config(folder, name, CASE, groups.dp_size)
    config.monitoring.log_interval_steps = 1
    config.monitoring.validation_interval_steps = 0
    config.checkpoint.interval_steps = 0
    config.checkpoint.keep_best = 0
    run = start(groups, config, [str(folder / "corpus")])
    if groups.world_rank == rank:
        slow(run)
    assert run.run() == 0
    run.reporter.close("done", 0)


def train_both(groups, folder: Path) -> None:
    train_slowed(groups, folder, "computing", 1, slow_computing)
    train_slowed(groups, folder, "reading", 0, slow_reading)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("slow")
    documents = random_documents(40, 30, vocabulary_size=VOCABULARY)
    write_corpus(made / "corpus", documents, vocabulary_size=VOCABULARY)
    run_on_cpu(train_both, made, dp=2)
    return made


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


CASES_OF_SLOWNESS = [("computing", 1, "forward and backward"), ("reading", 0, "waiting for data")]


@pytest.mark.parametrize("name, rank, phase", CASES_OF_SLOWNESS)
def test_the_slow_rank_is_in_the_metrics(folder, name, rank, phase):
    lines = [each for each in records(folder / name, "metrics.jsonl") if each["kind"] == "train"]
    assert len(lines) == STEPS
    named = [each["throughput/slowest_rank"] for each in lines]
    assert statistics.mode(named) == rank, "on a busy machine the other one may be slower once"
    own = [each for each in lines if each["throughput/slowest_rank"] == rank]
    assert statistics.median(_of(own, "seconds")) > 0.9 * SLEEP_SECONDS
    assert statistics.median(_of(own, "excess_seconds")) > 0.5 * SLEEP_SECONDS


def _of(lines: list[dict], what: str) -> list[float]:
    return [each[f"throughput/slowest_rank_{what}"] for each in lines]


@pytest.mark.parametrize("name, rank, phase", CASES_OF_SLOWNESS)
def test_the_warning_names_the_machine_and_the_phase(folder, name, rank, phase):
    warnings = [each["text"] for each in records(folder / name, "warnings.jsonl")]
    [sentence] = [text for text in warnings if "slower than the others" in text]
    assert f": rank {rank} on {socket.gethostname()}. " in sentence
    assert f"Most of the difference is in {phase}." in sentence
