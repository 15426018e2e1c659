"""A run that diverges, or whose loss jumps, is told of everywhere: exit code, status.json,
warnings.jsonl, Weights & Biases.
"""

import json

import pytest

from tests.end_to_end.small_run import command, lines, make_corpus, run_to_end


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_run_that_diverges_is_told_everywhere(corpus, tmp_path):
    run = tmp_path / "run"
    said = run_to_end(
        command(
            corpus,
            run,
            *("--optimizer.learning_rate", "1e30", "--optimizer.clip_grad_norm", "0"),
            *("--monitoring.wandb.mode", "offline"),
            processes=1,
        ),
        exit_code=4,
    )
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["steps"]) == ("failed", 4, 14)
    assert "training diverged" in status["reason"]
    assert f"train: {status['reason']}" in said
    errors = [line["text"] for line in lines(run, "warnings.jsonl") if line["level"] == "error"]
    assert errors == [status["reason"]]
    (record,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert status["reason"].encode() in record.read_bytes()
    assert not (run / "lock").exists()


def test_a_loss_that_jumps_after_a_resume_is_measured_against_the_lines_before_it(corpus, tmp_path):
    run = tmp_path / "run"

    def train(steps, learning_rate):
        settings = ("--schedule.train_steps", steps, "--optimizer.learning_rate", learning_rate)
        every_step = ("--monitoring.log_interval_steps", "1")
        run_to_end(command(corpus, run, *settings, *every_step, processes=1))

    train("14", "1e-3")
    assert not (run / "warnings.jsonl").exists()
    train("18", "30")
    jumps = [line for line in lines(run, "warnings.jsonl") if "jumped to" in line["text"]]
    assert len(jumps) == 1
    assert 14 < jumps[0]["step"] <= 18
