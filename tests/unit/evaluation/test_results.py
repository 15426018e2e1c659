"""What is said, written and logged of an evaluation's metrics."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.evaluation import results
from megatron_slm.evaluation.measure import _bits_per_byte
from megatron_slm.evaluation.options import EvaluateOptions, TokenSetConfig, option_problems
from megatron_slm.evaluation.table import rows_of
from megatron_slm.monitoring import run_status, wandb_sink

METRICS = {
    "validation/a/tokens": 1000,
    "validation/a/loss": 2.0,
    "validation/a/perplexity": math.exp(2.0),
    "validation/a/worth/tokens": 0,
    "validation/b/tokens": 10,
    "validation/b/loss": 1.0,
    "validation/b/perplexity": math.exp(1.0),
    "validation/b/unknown_tokens": 3,
}


def test_bits_per_byte():
    nats = 10 * math.log(2)
    assert _bits_per_byte("a", nats, [5, 0]) == {
        "validation/a/bytes": 5,
        "validation/a/bits_per_byte": pytest.approx(2.0),
    }
    assert _bits_per_byte("a", nats, [5, 2]) == {"validation/a/unknown_tokens": 2}
    assert _bits_per_byte("a", 0.0, [0, 0]) == {"validation/a/bytes": 0}


def test_rows_and_warnings_say_what_there_is_and_what_is_missing():
    assert rows_of(METRICS, ["a", "b"]) == [
        ("a", "1,000", "2.0000", "7.389", "–"),
        ("  worth", "0", "–", "–", "–"),
        ("b", "10", "1.0000", "2.718", "–"),
    ]
    warnings = results.warnings_of(METRICS, ["a", "b"])
    assert len(warnings) == 2
    assert warnings[0] == "a/worth has no loss: none of its tokens was read"
    assert "3 of its tokens are the unknown token" in warnings[1]


class Sink:
    """Keeps what a WandbSink is given."""

    def __init__(self, settings, **named):
        self.said = [named["run_id"], named["name"]]
        SINKS.append(self.said)
        self.location = "offline; upload it with: wandb sync here"

    def log(self, record, step):
        self.said += [record, step]

    def close(self, state="done", exit_code=0):
        self.said.append(state)


SINKS: list = []


@pytest.fixture
def job(tmp_path, monkeypatch):
    SINKS.clear()
    monkeypatch.setattr(wandb_sink, "WandbSink", Sink)
    (tmp_path / "wandb_run_id").write_text("abc\n")
    return SimpleNamespace(run_folder=tmp_path, run_config=Config())


def test_results_join_the_run_of_training_and_leave_its_state(job):
    run_status.begin(job.run_folder, 7)
    run_status.end(job.run_folder, "stopped", "on request", step=3, exit_code=85)
    record = {"step": 3, "tokens/processed": 300, "metrics": METRICS}
    assert "wandb sync here" in results.log_to_wandb(job, record)
    expected = {"tokens/processed": 300, **METRICS}
    assert [["abc", job.run_folder.name, expected, 3, "stopped"]] == SINKS


def test_the_run_of_a_training_that_goes_on_is_left_alone(job):
    run_status.begin(job.run_folder, 7)
    record = {"step": 3, "tokens/processed": 300, "metrics": METRICS}
    assert "still training" in results.log_to_wandb(job, record)
    assert SINKS == []


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"checkpoint": ""}, "give one of checkpoint"),
        ({"checkpoint": "", "huggingface": "h"}, "corpora: got none"),
        ({"checkpoint": "", "huggingface": "h", "wandb": True}, "has no W&B run"),
        ({"corpora": [{"name": "a/b", "corpus": "c"}]}, "without a /"),
        ({"corpora": [{"name": "a", "corpus": "c"}] * 2}, "2 are named 'a'"),
        ({"token_sets": [{"name": "loss", "corpus": "a", "tokens": "t"}]}, "is none of"),
        ({"token_sets": [{"name": "s", "corpus": "a"}]}, "give one of tokens"),
        (
            {"token_sets": [{"name": "s", "corpus": "a", "tokens": "t", "minus": "m"}]},
            "minus goes with scores only",
        ),
        ({"token_sets": [{"name": "s", "corpus": "a", "tokens": "t"}] * 2}, "2 sets of corpus"),
        ({"parallel": {"distributed_optimizer": True}}, "evaluation has no gradients"),
        ({"micro_batch_size": 0}, "micro_batch_size: got 0"),
    ],
)
def test_what_is_wrong_with_the_options_is_a_sentence(changes, sentence):
    from megatron_slm.config.load import from_mapping

    options, unreadable = from_mapping({"checkpoint": "run"} | changes, EvaluateOptions)
    assert not unreadable
    assert any(sentence in problem for problem in option_problems(options))


def test_plain_options_have_no_problem():
    assert not [*option_problems(EvaluateOptions(checkpoint="run"))]
    assert asdict(TokenSetConfig())["top_fraction"] == 0.6
