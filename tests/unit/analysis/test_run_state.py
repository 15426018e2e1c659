"""An unfinished run is called so, with its step and its reason, and has no final loss."""

import json
import os
import socket

import pytest
import yaml

from megatron_slm import report
from megatron_slm.analysis import captions
from megatron_slm.analysis.baseline import find_baseline
from megatron_slm.analysis.run_folder import read_run, read_runs
from megatron_slm.analysis.run_state import read_state

NO_PROCESS = 2**22 + 1
"""Above the largest process id that Linux gives."""
CONFIG = {"schedule": {"train_steps": 120}, "data": {"train": ["data/corpus"]}}


def write_status(folder, state, step, **changes):
    status = {
        "state": state,
        "reason": "",
        "step": step,
        "steps": 120,
        "exit_code": None,
        "started_at": "2026-05-04T09:12:44+00:00",
        "updated_at": "2026-05-04T11:02:10+00:00",
        "host": "node3",
        "pid": 41872,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps(status | changes))


def write_run(folder, last_step, scorer="none"):
    """A run of 100 tokens per step, validated and logged every 20 steps up to `last_step`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"selection": {"scorer": scorer}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = []
    for step in range(0, last_step + 1, 20):
        line = {"step": step, "tokens/processed": step * 100}
        records.append(line | {"kind": "validation", "validation/target/loss": 5.0 - step / 100})
        records.append(line | {"kind": "train", "loss/all": 4.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return folder


@pytest.mark.parametrize(
    ("state", "step", "words"),
    [
        ("done", 120, "done"),
        ("stopped", 60, "stopped at step 60 of 120"),
        ("failed", 3, "failed at step 3 of 120"),
        (
            "running",
            60,
            "running, at step 60 of 120 when it last wrote (2026-05-04T11:02:10+00:00)",
        ),
    ],
)
def test_the_run_s_own_word_is_taken(state, step, words, tmp_path):
    write_status(tmp_path, state, step)
    found = read_state(tmp_path, CONFIG, 0)
    assert found.description == words
    assert found.is_finished == (state == "done")


def test_a_run_that_died_without_a_word_is_known_on_its_own_machine(tmp_path):
    write_status(tmp_path, "running", 60, host=socket.gethostname(), pid=NO_PROCESS)
    assert (
        read_state(tmp_path, CONFIG, 0).description == "ended without a word after step 60 of 120"
    )
    write_status(tmp_path, "running", 60, host=socket.gethostname(), pid=os.getpid())
    assert read_state(tmp_path, CONFIG, 0).state == "running"


def test_a_run_killed_while_it_started_again_is_as_far_as_its_metrics(tmp_path):
    write_status(tmp_path, "running", 0, host=socket.gethostname(), pid=NO_PROCESS)
    assert (
        read_state(tmp_path, CONFIG, 80).description == "ended without a word after step 80 of 120"
    )


@pytest.mark.parametrize(
    ("config", "logged_step", "state", "words"),
    [
        (CONFIG, 120, "done by its metrics", "done by its metrics"),
        (
            CONFIG,
            60,
            "unfinished",
            "unfinished by its metrics (it has no status.json), last at step 60 of 120",
        ),
        (
            {
                "schedule": {"train_steps": 0, "train_tokens": 4097},
                "data": {"global_batch_size": 32, "sequence_length": 128},
            },
            1,
            "unfinished",
            "unfinished by its metrics (it has no status.json), last at step 1 of 2",
        ),
        ({}, 60, "unknown", "last at step 60; how long it was to be is not known"),
    ],
)
def test_older_runs_are_judged_by_their_metrics_and_it_is_said(
    config, logged_step, state, words, tmp_path
):
    found = read_state(tmp_path, config, logged_step)
    assert found.state == state
    assert found.description == words


def test_only_finished_runs_have_a_final_loss(tmp_path, capsys):
    plain = write_run(tmp_path / "plain", 120)
    write_status(plain, "done", 120)
    slm = write_run(tmp_path / "slm", 60, "excess_loss")
    reason = "the gradient norm of step 73 is nan: training <diverged>"
    write_status(slm, "failed", 73, reason=reason, exit_code=4)
    output = tmp_path / "r.html"
    assert report.main(["--runs", str(plain), str(slm), "--output", str(output)]) == 0
    page = output.read_text()
    assert "<td>4.400 (last, at step 60 of 120)</td>" in page
    assert "<td>3.800</td>" in page
    assert "<th>loss on target (nats per token)</th>" in page
    assert "tokens to reach 3.800, the final loss of plain" in page
    assert "Not finished: slm: failed at step 73 of 120." in page
    assert (
        "<b>slm</b>: failed at step 73 of 120: the gradient norm of step 73 is nan: training "
        "&lt;diverged&gt;" in page
    )
    told = capsys.readouterr().out
    assert "last loss" in told
    assert "final loss of plain" in told
    assert "Not finished: slm: failed at step 73 of 120." in told


def test_the_loss_of_an_unfinished_baseline_is_not_called_final(tmp_path):
    plain, slm = write_run(tmp_path / "plain", 60), write_run(tmp_path / "slm", 60, "excess_loss")
    write_status(plain, "stopped", 60, reason="stopped on request after step 60 of 120")
    output = tmp_path / "r.html"
    assert report.main(["--runs", str(plain), str(slm), "--output", str(output)]) == 0
    page = output.read_text()
    assert "final loss of plain" not in page
    assert "tokens to reach 4.400, the loss of plain (last, at step 60 of 120)" in page
    assert 'class="best"' not in page
    assert captions.unfinished(read_runs([plain])) == (
        "Not finished: plain: stopped at step 60 of 120."
    )


def test_a_failure_that_is_among_the_warnings_is_told_once(tmp_path):
    folder = write_run(tmp_path / "slm", 60, "excess_loss")
    write_status(folder, "failed", 73, reason="it diverged")
    (folder / "warnings.jsonl").write_text('{"step": 73, "level": "error", "text": "it diverged"}')
    output = tmp_path / "r.html"
    assert report.main(["--runs", str(folder), "--output", str(output)]) == 0
    assert output.read_text().count("it diverged") == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_run_without_metrics_is_refused_with_what_became_of_it(there, tmp_path):
    folder = tmp_path / "run"
    write_status(folder, "failed", 3, reason="it diverged")
    if there:
        (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="Its status: failed at step 3 of 120: it diverged"):
        read_run(folder)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (
            "failed",
            "After 12k processed tokens the loss of plain on target is 3.800 nats per token; slm",
        ),
        ("running", "After 6k processed tokens plain and slm are level on target at 4.400"),
    ],
)
def test_a_run_that_failed_early_does_not_hold_the_comparison_back(state, sentence, tmp_path):
    plain, slm = write_run(tmp_path / "plain", 120), write_run(tmp_path / "slm", 60, "excess_loss")
    write_status(slm, state, 60)
    text = captions.validation(read_runs([plain, slm]), "target")
    assert text.startswith(sentence)
    assert ("slm did not come so far" in text) == (state == "failed")


def test_a_plain_run_that_came_to_its_end_is_the_baseline_before_one_that_did_not(tmp_path):
    failed, plain = write_run(tmp_path / "failed", 60), write_run(tmp_path / "plain", 120)
    write_status(failed, "failed", 60)
    slm = write_run(tmp_path / "slm", 120, "excess_loss")
    assert find_baseline(read_runs([failed, plain, slm])).run.name == "plain"
