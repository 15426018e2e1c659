"""How far scoring is: a bar with tokens/s and the time left on a terminal, a line a minute in a
log.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from megatron_slm.monitoring.console import format_duration, short_number

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_INTERVAL_SECONDS = 60


class ProgressBar:
    """Estimates the progress of the whole job from this rank's part: shards are dealt out in turn,
    so ranks advance alike.
    """

    def __init__(
        self,
        total_tokens: int,
        rank_tokens: int,
        *,
        shown: bool,
        work: tuple[str, str] = ("scoring", "scored"),
    ):
        """work: what is done to the tokens, as it stands in the bar and in the lines of a log."""
        self.total_tokens = total_tokens
        self.rank_tokens = rank_tokens
        self.shown = shown
        self.doing, self.done = work
        self.done_tokens = 0
        self.bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        self.started_at = time.monotonic()
        self.printed_at = self.started_at
        if self.shown and sys.stderr.isatty():
            from rich.console import Console

            from megatron_slm.monitoring.progress_line import fitted_progress

            self.bar = fitted_progress(Console(stderr=True))
            self.task = self.bar.add_task(
                self.doing, total=self.total_tokens, parts=self._line(0.0, 0.0)
            )
            self.bar.start()
        return self

    def advance(self, tokens: int) -> None:
        """Count tokens that this rank has scored."""
        self.done_tokens += tokens
        done_tokens = self.total_tokens * min(1.0, self.done_tokens / max(1, self.rank_tokens))
        now = time.monotonic()
        tokens_per_second = done_tokens / max(1e-9, now - self.started_at)
        if self.bar is not None:
            parts = self._line(done_tokens, tokens_per_second)
            self.bar.update(self.task, completed=int(done_tokens), parts=parts)
        elif self.shown and now - self.printed_at >= LINE_INTERVAL_SECONDS:
            self.printed_at = now
            left_minutes = (self.total_tokens - done_tokens) / tokens_per_second / 60
            print(
                f"{self.done} {done_tokens:,.0f} of {self.total_tokens:,} tokens, "
                f"{tokens_per_second:,.0f} tokens/s, {left_minutes:,.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )

    def _line(self, done_tokens: float, tokens_per_second: float) -> list:
        from megatron_slm.monitoring.progress_line import BAR, Part

        parts = [Part(4, self.doing), BAR]
        done = short_number(done_tokens)
        total = short_number(self.total_tokens)
        parts.append(Part(0, f"{done}/{total} tokens"))
        if tokens_per_second:
            left = format_duration((self.total_tokens - done_tokens) / tokens_per_second)
            parts.append(Part(3, f"{short_number(tokens_per_second)} tokens/s"))
            parts.append(Part(1, f"{left} left"))
        return parts

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
