"""How far scoring is: a bar with tokens/s and the time left on a terminal, a line a minute in a
log.
"""

import sys
import time

from megatron_slm.monitoring.console import format_duration, short_number

LINE_INTERVAL_SECONDS = 60


class ProgressBar:
    """Estimates the whole job from this rank's share: shards are dealt out in turn, so ranks
    advance alike.
    """

    def __init__(self, total_tokens: int, own_tokens: int, *, shown: bool):
        self.total_tokens, self.own_tokens, self.shown = total_tokens, own_tokens, shown
        self.done_tokens = 0
        self.bar = None

    def __enter__(self) -> "ProgressBar":
        self.started_at = self.printed_at = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from rich.console import Console

            from megatron_slm.monitoring.progress_line import fitted_progress

            self.bar = fitted_progress(Console(stderr=True))
            self.task = self.bar.add_task(
                "scoring", total=self.total_tokens, parts=self._line(0.0, 0.0)
            )
            self.bar.start()
        return self

    def advance(self, own_tokens: int) -> None:
        self.done_tokens += own_tokens
        done = self.total_tokens * min(1.0, self.done_tokens / max(1, self.own_tokens))
        now = time.monotonic()
        rate = done / max(1e-9, now - self.started_at)
        if self.bar is not None:
            self.bar.update(self.task, completed=int(done), parts=self._line(done, rate))
        elif self.shown and now - self.printed_at >= LINE_INTERVAL_SECONDS:
            self.printed_at = now
            left_minutes = (self.total_tokens - done) / rate / 60
            print(
                f"scored {done:,.0f} of {self.total_tokens:,} tokens, {rate:,.0f} tokens/s, {left_minutes:,.0f} minutes left",
                file=sys.stderr,
                flush=True,
            )

    def _line(self, done_tokens: float, rate: float) -> list:
        from megatron_slm.monitoring.progress_line import BAR, Part

        parts = [Part(4, "scoring"), BAR]
        done, total = short_number(done_tokens), short_number(self.total_tokens)
        parts.append(Part(0, f"{done}/{total} tokens"))
        if rate:
            left = format_duration((self.total_tokens - done_tokens) / rate)
            parts += [Part(3, f"{short_number(rate)} tokens/s"), Part(1, f"{left} left")]
        return parts

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()
