"""Whether a run is finished, by its status.json, or by its metrics where there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.monitoring.run_status import read_status

FINISHED = ("done", "done by its metrics")
DERIVED = ("done by its metrics", "unfinished", "unknown")


@dataclass(frozen=True)
class RunState:
    """How a run stands."""

    state: str
    """done, stopped, failed, running, killed; of a run without status.json: done by its metrics,
    unfinished, unknown."""
    step: int
    """The last step that is known of."""
    steps: int | None = None
    """Steps of the whole run; None where they are not known."""
    reason: str = ""
    """Why it ended; a sentence of the run's, or empty."""
    heard_at: str = ""
    """When a running run last updated its status."""

    @property
    def is_finished(self) -> bool:
        """Whether its last step is trained: only then a loss is its final one."""
        return self.state in FINISHED

    @property
    def is_broken_off(self) -> bool:
        """Whether it ended unintentionally."""
        return self.state in ("failed", "killed")

    @property
    def is_told(self) -> bool:
        """Whether the state comes from status.json, and not from the metrics."""
        return self.state not in DERIVED

    @property
    def short(self) -> str:
        """Its state in a table."""
        return {"killed": "ended without a word"}.get(self.state, self.state)

    @property
    def description(self) -> str:
        """Its state in a sentence, with the step."""
        at = place(self.step, self.steps)
        return {
            "stopped": f"stopped at {at}",
            "failed": f"failed at {at}",
            "running": f"running, at {at} when it last wrote ({self.heard_at})",
            "killed": f"ended without a word after {at}",
            "unfinished": f"unfinished by its metrics (it has no status.json), last at {at}",
            "unknown": f"last at {at}; how long it was to be is not known",
        }.get(self.state, self.state)


def place(step: int, steps: int | None) -> str:
    """Of the form "step 60 of 120"."""
    return f"step {step}" if steps is None else f"step {step} of {steps}"


def read_state(folder: str | Path, config: Mapping[str, Any], logged_step: int) -> RunState:
    """The state of a run folder.

    logged_step: the last step in its metrics. A run that is only starting again has passed it
    before.
    """
    status = read_status(folder)
    if status is None:
        return _derived(config, logged_step)
    state = "killed" if status.was_killed else status.state
    step = max(status.step, logged_step)
    return RunState(state, step, status.steps, status.reason, status.updated_at)


def _derived(config: Mapping[str, Any], logged_step: int) -> RunState:
    """Of a run folder without status.json (an older run).

    Its last logged step is compared with the steps that config.yaml asks for.
    """
    steps = _configured_steps(config)
    if steps is None:
        return RunState("unknown", logged_step)
    state = "done by its metrics" if logged_step >= steps else "unfinished"
    return RunState(state, logged_step, steps)


def _configured_steps(config: Mapping[str, Any]) -> int | None:
    schedule, data = config.get("schedule") or {}, config.get("data") or {}
    if schedule.get("train_steps"):
        return int(schedule["train_steps"])
    step_tokens = data.get("global_batch_size", 0) * data.get("sequence_length", 0)
    tokens = schedule.get("train_tokens")
    return -(-tokens // step_tokens) if tokens and step_tokens else None
