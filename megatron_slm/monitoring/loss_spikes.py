"""The alarm for a training loss that jumps: against the median of the log lines before it and their
spread. No torch.

The first SMALLEST_HISTORY_LINES lines of a run are history only.

Median and median deviation, because a mean and a standard deviation would be moved by the very
spikes they should show. The loss of a line is a mean over many tokens, so its noise is near to a
normal distribution's, of which 8 spreads are never exceeded; a falling loss lies below its recent
median. A loss that rises over hundreds of lines is no spike and is not detected here.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

WINDOW_LINES = 50
SMALLEST_HISTORY_LINES = 10
SPREADS = 8.0
SMALLEST_RISE_NATS = 0.1
"""A rise below this is no alarm, however quiet the loss was: a run on few distinct tokens has
almost no spread.
"""
CHANGED_KEEP_FRACTION = 0.05
_NORMAL_DEVIATION = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation."""


class LossSpikes:
    """Remembers the losses of recent log lines; kept in checkpoints, so that a resumed run warns as
    an uninterrupted one.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._series: list[Any] = []
        """What the losses are of: the metric's name and, for the loss of selected tokens, the keep
        fraction, else None. A list, because it goes through JSON.
        """
        self._is_high = False
        """Whether the last line was part of a spike that was reported already."""

    def look(self, summary: Mapping[str, Any], keep_fraction: float, step: int) -> str | None:
        """The warning if the loss of this log line is a spike that was not reported yet, else None.

        summary: reduced metrics of the interval. loss/all is watched, or loss/selected if loss/all
        is not computed. A loss that is not finite is left out. keep_fraction: what was configured
        for the interval; fewer kept tokens have a higher loss by choice.
        """
        name = "loss/all" if "loss/all" in summary else "loss/selected"
        loss = summary.get(name)
        if loss is None or not math.isfinite(loss):
            return None
        self._begin_anew_if_changed(name, keep_fraction if name == "loss/selected" else None)
        sentence = self._judge(name, loss, step)
        self._losses = [*self._losses, loss][-WINDOW_LINES:]
        return sentence

    def _begin_anew_if_changed(self, name: str, keep_fraction: float | None) -> None:
        if self._series and self._series[0] == name:
            before = self._series[1]
            if keep_fraction is None or abs(keep_fraction - before) <= CHANGED_KEEP_FRACTION:
                return
        self._series, self._losses, self._is_high = [name, keep_fraction], [], False

    def _judge(self, name: str, loss: float, step: int) -> str | None:
        if len(self._losses) < SMALLEST_HISTORY_LINES:
            return None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(earlier - median) for earlier in self._losses)
        spread = _NORMAL_DEVIATION * deviation
        allowed = max(SPREADS * spread, SMALLEST_RISE_NATS)
        was_high, self._is_high = (
            self._is_high,
            loss > median + allowed / (2 if self._is_high else 1),
        )
        if was_high or not self._is_high:
            return None
        return (
            f"{name} jumped to {loss:.3f} nats at step {step}; the {len(self._losses)} log lines "
            f"before had a median of {median:.3f} and a spread of {spread:.3f}. If it does not "
            "fall back within a few log lines, stop the run and go on from a checkpoint before "
            "this step with a lower optimizer.learning_rate or optimizer.clip_grad_norm, after a "
            "look at the data of these steps (docs/monitoring.md, When the loss jumps)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "series": self._series, "is_high": self._is_high}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one saved before there was this alarm has {}, and the history
        begins anew.
        """
        self._losses = list(state.get("losses", []))
        self._series = list(state.get("series", []))
        self._is_high = state.get("is_high", False)
