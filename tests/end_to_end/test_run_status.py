"""A run that diverges, or whose loss jumps, is told of everywhere: exit code, status.json,
warnings.jsonl, Weights & Biases.
"""

import json

from tests.end_to_end.small_run import lines, train


def test_a_run_that_diverges_is_told_everywhere(corpus, tmp_path):
    run = tmp_path / "run"
    said = train(
        corpus,
        run,
        *("--optimizer.learning_rate", "1e30", "--optimizer.clip_grad_norm", "0"),
        *("--monitoring.wandb.mode", "offline"),
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

    every_step = ("--monitoring.log_interval_steps", "1")

    def train_to(step, learning_rate):
        settings = ("--schedule.train_steps", step, "--optimizer.learning_rate", learning_rate)
        train(corpus, run, *settings, *every_step)

    train_to("14", "1e-3")
    assert not (run / "warnings.jsonl").exists()
    train_to("18", "30")
    jumps = [line for line in lines(run, "warnings.jsonl") if "jumped to" in line["text"]]
    assert len(jumps) == 1
    assert 14 < jumps[0]["step"] <= 18
