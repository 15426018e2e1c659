"""A run that diverges ends as a failure everywhere: exit code, status.json, warnings.jsonl, Weights & Biases."""

import json

from tests.end_to_end.small_run import command, lines, make_corpus, run_to_end


def test_a_run_that_diverges_is_told_everywhere(tmp_path):
    run = tmp_path / "run"
    said = run_to_end(
        command(
            make_corpus(tmp_path),
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
    assert f"slm-train: {status['reason']}" in said
    errors = [line["text"] for line in lines(run, "warnings.jsonl") if line["level"] == "error"]
    assert errors == [status["reason"]]
    (record,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert status["reason"].encode() in record.read_bytes()
    assert not (run / "lock").exists()
