"""metrics.jsonl continues as an uninterrupted run's would, and no sink can stop a run."""

import contextlib
import io
import json
import os

import pytest

from megatron_slm.monitoring import ConsoleSink, JsonlSink, MultiSink, NullSink
from megatron_slm.monitoring.console import format_duration


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(path, steps, resume_step=None):
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.log({"kind": "train", "loss/all": 4.0 - step / 100}, step)
    sink.close()


def test_resume_drops_later_steps_and_continues_like_an_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write_steps(whole, range(10, 80, 10))
    write_steps(killed, range(10, 60, 10))  # the checkpoint is of step 30, the kill came after 50
    write_steps(killed, range(40, 80, 10), resume_step=30)
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "torn", [b'{"step": 30, "kind": "tr', b'{"step": 20}', b"\x00\x00\x00", b'"30"\n', b"[30]\n"]
)
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20])
    with open(path, "ab") as file:
        file.write(torn)
    write_steps(path, [30], resume_step=20)
    assert [record["step"] for record in lines(path)] == [10, 20, 30]
    assert not path.with_name("metrics.jsonl.tmp").exists()


def test_starting_anew_keeps_the_file_of_an_earlier_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [10, 20])
    write_steps(path, [10])
    assert [record["step"] for record in lines(path)] == [10]
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl.previous")] == [10, 20]


def test_values_without_a_number_are_null_and_step_comes_first(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(
        {
            "kind": "train",
            "step": 3,
            "a": float("nan"),
            "b": [1.0, float("inf")],
            "tokens/processed": 12,
        },
        3,
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert (
        text
        == '{"step": 3, "kind": "train", "a": null, "b": [1.0, null], "tokens/processed": 12}\n'
    )


def test_a_full_disk_leaves_whole_lines_and_loses_no_record(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    heard = io.StringIO()
    sinks = MultiSink([JsonlSink(path), ConsoleSink(total_steps=9, stream=heard)])
    sinks.log({"loss/all": 3.0}, 1)
    with monkeypatch.context() as patch:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        sinks.log({"loss/all": 2.0}, 2)
        sinks.log({"loss/all": 1.5}, 3)
        assert [record["step"] for record in lines(path)] == [1]
    assert heard.getvalue().count("No space left on device") == 1, "told once, on the other sink"
    sinks.log({"loss/all": 1.0}, 4)
    assert [record["step"] for record in lines(path)] == [1, 2, 3, 4]


class BrokenSink(NullSink):
    def log(self, record, step):
        raise RuntimeError("broken")

    message = close = lambda self, *args: (_ for _ in ()).throw(RuntimeError("broken"))


def test_a_failing_sink_is_told_on_the_others_and_stops_nothing(tmp_path):
    sinks = MultiSink([BrokenSink(), BrokenSink(), JsonlSink(tmp_path / "metrics.jsonl")])
    for step in (1, 2):
        sinks.log({"kind": "train"}, step)
    sinks.message("a sentence", "warning")
    sinks.close()
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    told = lines(tmp_path / "warnings.jsonl")
    assert [line["text"] for line in told] == [
        "BrokenSink failed, training goes on: RuntimeError: broken"
    ] * 2 + ["a sentence"]
    with pytest.raises(ValueError, match="loud"):
        sinks.message("x", "loud")


def test_a_closed_pipe_ends_no_run(tmp_path):
    """`train | tee log`, and Ctrl-C takes tee away.

    rich alone would end the process before the checkpoint is saved.
    """
    reading, writing = os.pipe()
    os.close(reading)
    pipe = open(writing, "w", buffering=1)  # noqa: SIM115  handed to a sink
    sinks = MultiSink(
        [ConsoleSink(total_steps=9, stream=pipe), JsonlSink(tmp_path / "metrics.jsonl")]
    )
    sinks.message("stopped on request", "warning")
    sinks.log({"kind": "train", "loss/selected": 2.0}, 1)
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
    assert "BrokenPipeError" in (tmp_path / "warnings.jsonl").read_text()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_console_without_a_terminal_prints_plain_lines():
    stream = io.StringIO()
    console = ConsoleSink(total_steps=200, stream=stream)
    console.table("run", {"tokens per step": 2048, "model": "[1.1B]"})
    console.log(
        {
            "kind": "train",
            "loss/selected": 3.25,
            "loss/all": 3.5,
            "selection/kept_fraction": 0.6,
            "optimizer/learning_rate": 3e-4,
            "throughput/tokens_per_second": 12345.0,
            "throughput/eta_seconds": 62.0,
        },
        10,
    )
    console.log(
        {"kind": "validation", "validation/curated/loss": 3.0456, "validation/curated/tokens": 99},
        10,
    )
    console.message("look [here]", "warning")
    console.close()
    assert stream.getvalue().splitlines() == [
        "run",
        "  tokens per step  2048",
        "  model            [1.1B]",
        "step 10/200  loss 3.2500 (all 3.500)  kept 60%  lr 3.00e-04  12.3k tokens/s  0:01:02 left",
        "step 10  validation/curated loss 3.0456",
        "warning: look [here]",
    ]
    assert "\x1b" not in stream.getvalue()


def test_durations():
    assert [format_duration(seconds) for seconds in (0.4, 3725, 2 * 86400 + 10800)] == [
        "0:00:00",
        "1:02:05",
        "2d 3:00:00",
    ]
