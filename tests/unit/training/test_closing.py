"""The last lines of a run: what came out, and where everything is."""

from pathlib import Path

from megatron_slm.training.closing import closing_lines

TRAINED = {
    "kind": "train",
    "step": 14,
    "tokens/processed": 3584,
    "tokens/selected": 2155,
    "loss/selected": 5.7042,
    "loss/all": 5.653,
}
VALIDATED = {"kind": "validation", "step": 14, "validation/target/loss": 5.6503}


def test_losses_tokens_and_time():
    first, *_ = closing_lines(
        Path("runs/a"), "a", {"train": TRAINED, "validation": VALIDATED}, 62, None
    )
    assert first == (
        "done: step 14, 3,584 tokens (2,155 of them trained on), time 0:01:02, "
        "loss 5.7042 (all 5.653) at the last log line, validation/target loss 5.6503"
    )


def test_the_time_of_a_resumed_run_is_that_of_its_last_start():
    first, *_ = closing_lines(Path("runs/a"), "a", {"train": TRAINED}, 62, 7)
    assert "time 0:01:02 (since it was resumed after step 7)" in first


def test_a_run_that_was_trained_before_has_no_loss_to_tell():
    first, *_ = closing_lines(Path("runs/a"), "a", {"validation": VALIDATED}, 2, 14)
    assert first == "done: nothing was left to train, all steps were trained before"


def test_where_everything_is(tmp_path):
    folder = tmp_path / "my run"
    for step in (7, 14):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    _, checkpoint, metrics, report, export = closing_lines(
        folder, "my run", {"train": TRAINED}, 62, None
    )
    assert checkpoint.split(None, 1) == ["checkpoint", f"{folder}/checkpoints/step_00000014"]
    assert metrics.split(None, 1) == ["metrics", f"{folder}/metrics.jsonl"]
    assert f"megatron_slm.report --runs '{folder}' --output '{folder}/report.html'" in report
    assert f"export_hf --checkpoint '{folder}' --output 'exports/my run'" in export
