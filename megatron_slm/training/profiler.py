"""torch's profiler over a window of steps; every rank writes its own trace."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE_FOLDER = "profile"


class StepProfiler:
    """A context manager that records the steps from the first to the last of a window, if any.

    The trace is RUN/profile/rank_NNNNN.steps_A_B.json.gz, for chrome://tracing or Perfetto.
    """

    def __init__(
        self,
        window: Sequence[int],
        run_folder: Path,
        rank: int,
        *,
        done_steps: int,
        report: Callable[[str, str], None],
    ):
        """window: empty, or first and last step. done_steps: what the run has done before."""
        self.window = window
        self.run_folder = run_folder
        self.rank = rank
        self.report = report
        self._done_steps = done_steps
        self._first_recorded = 0
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfiler":
        self._start_where_due()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()  # a run that ends inside the window has recorded its beginning

    def after_step(self, step: int) -> None:
        """Called when `step` is done: begins or ends the recording if it is due."""
        self._done_steps = step
        if self._profile is not None and step >= self.window[1]:
            self._finish()
        self._start_where_due()

    def _start_where_due(self) -> None:
        if not self.window or self._profile is not None:
            return
        first, last = self.window
        if first <= self._done_steps + 1 <= last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._first_recorded = self._done_steps + 1
            self._profile = profile(activities=activities)
            self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        steps = f"{self._first_recorded}_{self._done_steps}"
        path = self.run_folder / PROFILE_FOLDER / f"rank_{self.rank:05d}.steps_{steps}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self.report(f"{path} could not be written ({error})", "warning")
        else:
            self.report(f"the profile of steps {steps.replace('_', ' to ')} is in {path}", "info")
