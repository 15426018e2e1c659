"""However a run ends, status.json says it, and every sink hears of a failure and its exit code."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_slm.config.load import from_mapping
from megatron_slm.monitoring import run_status
from megatron_slm.training.ending import NonFiniteLoss, NotSaved, train_to_an_end

STEPS = 9


class HeardReporter:
    """Keeps what it is told."""

    def __init__(self):
        self.messages, self.closed = [], None

    def message(self, text, level):
        self.messages.append((level, text))

    def close(self, state, exit_code):
        self.closed = (state, exit_code)


class ScriptedRun:
    """A run whose start or training ends as told: with an exit code or an exception."""

    def __init__(self, outcome, fails_at_start=False):
        self.outcome, self.fails_at_start = outcome, fails_at_start
        self.step, self.steps, self.reporter = 0, STEPS, None

    def start(self):
        if self.fails_at_start:
            raise self.outcome
        self.reporter = HeardReporter()

    def run(self):
        self.step = 7
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def end_of(run, tmp_path, rank=0, world_size=1):
    schedule = {"train_steps": STEPS}
    config, _ = from_mapping({"run": {"folder": str(tmp_path)}, "schedule": schedule})
    groups = SimpleNamespace(
        world_rank=rank, world_size=world_size, is_logger=rank == world_size - 1
    )
    return train_to_an_end(config, groups, lambda: run)


def warned(folder):
    lines = (folder / "warnings.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("exit_code", "state", "reason"),
    [(0, "done", "its last step, 9"), (85, "stopped", "on request after step 7 of 9")],
)
def test_a_run_that_ends_in_good_order(exit_code, state, reason, tmp_path):
    run = ScriptedRun(exit_code)
    assert end_of(run, tmp_path) == exit_code
    status = run_status.read_status(tmp_path)
    assert (status.state, status.exit_code) == (state, exit_code)
    assert (status.step, status.steps) == (7, STEPS)
    assert reason in status.reason
    assert run.reporter.closed == (state, exit_code)
    assert run.reporter.messages == []


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(NonFiniteLoss("diverged"), 4), (NotSaved("no space"), 4), (ValueError("bad corpus"), 3)],
)
def test_a_failure_is_told_everywhere(error, exit_code, tmp_path, capsys):
    run = ScriptedRun(error)
    assert end_of(run, tmp_path) == exit_code
    status = run_status.read_status(tmp_path)
    assert (status.state, status.exit_code) == ("failed", exit_code)
    assert (status.reason, status.step) == (str(error), 7)
    assert run.reporter.messages == [("error", str(error))]
    assert run.reporter.closed == ("failed", exit_code)
    assert f"train: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("a bug\nwith details"), "RuntimeError: a bug"),
        (KeyboardInterrupt(), "interrupted from the keyboard"),
    ],
)
def test_what_nobody_expected_is_told_and_raised_again(error, words, tmp_path):
    run = ScriptedRun(error)
    with pytest.raises(type(error)):
        end_of(run, tmp_path)
    status = run_status.read_status(tmp_path)
    assert (status.state, status.reason, status.exit_code) == ("failed", words, 1)
    assert run.reporter.messages == [("error", words)]
    assert run.reporter.closed == ("failed", 1)


def test_a_failure_before_the_sinks_are_open_is_in_the_file_of_warnings(tmp_path):
    run = ScriptedRun(ValueError("every checkpoint is damaged"), fails_at_start=True)
    assert end_of(run, tmp_path) == 3
    assert run_status.read_status(tmp_path).state == "failed"
    assert warned(tmp_path) == [
        {"step": 0, "level": "error", "text": "every checkpoint is damaged"}
    ]


@pytest.fixture
def no_barrier(monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)


def test_the_rank_with_the_sinks_tells_the_reason_of_the_rank_that_failed_first(
    tmp_path, no_barrier, capsys
):
    run_status.begin(tmp_path, STEPS)
    assert end_of(ScriptedRun(ValueError("bad shard")), tmp_path, rank=1, world_size=3) == 3
    reason = run_status.read_status(tmp_path).reason
    assert reason.startswith("process 1 on ")
    assert [line["text"] for line in warned(tmp_path)] == [reason]

    logger = ScriptedRun(RuntimeError("Connection closed by peer"))
    with pytest.raises(RuntimeError):
        end_of(logger, tmp_path, rank=2, world_size=3)
    assert logger.reporter.messages == [("error", reason)]
    assert logger.reporter.closed == ("failed", 1)
    assert run_status.read_status(tmp_path).reason == reason


def test_what_all_ranks_find_together_is_said_once(tmp_path, no_barrier, capsys):
    runs = [ScriptedRun(NonFiniteLoss("diverged")) for _ in range(2)]
    codes = [end_of(run, tmp_path, rank, world_size=2) for rank, run in enumerate(runs)]
    assert codes == [4, 4]
    assert capsys.readouterr().err.count("diverged") == 1
    assert run_status.read_status(tmp_path).reason == "diverged"


def test_a_broken_connection_is_explained_by_the_process_that_is_gone(tmp_path, no_barrier):
    error = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error")
    with pytest.raises(RuntimeError):
        end_of(ScriptedRun(error), tmp_path, rank=0, world_size=2)
    assert "lost another process of the job" in run_status.read_status(tmp_path).reason
