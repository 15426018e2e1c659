"""What a person sees of a run: a bar while it works (on a terminal only), a table at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.monitoring.console import format_duration
from megatron_slm.monitoring.progress_line import BAR, Part, fitted_progress


class RunProgress:
    """A bar with MB/s of input, tokens/s, documents and the time left.

    Nothing is shown when stderr is not a terminal.
    """

    def __init__(self, total_bytes: int, done_bytes: int, documents: int, tokens: int) -> None:
        self._console = Console(stderr=True)
        self._total_bytes = total_bytes
        self._first_bytes = done_bytes
        self._first_tokens = tokens
        self._done_bytes = done_bytes
        self.seconds = 0.0

    def __enter__(self) -> RunProgress:
        self._started_at = time.monotonic()
        self._bar = fitted_progress(self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(
            "",
            total=self._total_bytes or None,
            completed=self._done_bytes,
            parts=[self._share_done(), BAR],
        )
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started_at
        self._bar.stop()

    def advance(self, source_bytes: int, documents: int, tokens: int) -> None:
        self._done_bytes += source_bytes
        if self._bar.disable:
            return
        seconds = max(time.monotonic() - self._started_at, 1e-3)
        bytes_per_second = (self._done_bytes - self._first_bytes) / seconds
        parts = [self._share_done(), BAR]
        if bytes_per_second:
            left = max(self._total_bytes - self._done_bytes, 0) / bytes_per_second
            parts.append(Part(1, f"{format_duration(left)} left"))
        parts += [
            Part(3, f"{bytes_per_second / 1e6:.1f} MB/s"),
            Part(4, f"{(tokens - self._first_tokens) / seconds / 1e6:.2f} M tokens/s"),
            Part(5, f"{documents:,} documents"),
        ]
        self._bar.update(self._task, completed=self._done_bytes, parts=parts)

    def _share_done(self) -> Part:
        share = self._done_bytes / self._total_bytes if self._total_bytes else 0.0
        return Part(0, f"{share:4.0%}")


def print_summary(
    prefix: str, manifest: CorpusManifest, statistics: dict[str, Any], seconds: float
) -> None:
    """Print the final table on standard output."""
    table = Table(
        title=f"{prefix}.bin  {manifest.tokens:,} tokens ({manifest.token_dtype}) in "
        f"{seconds:.1f} s",
        title_justify="left",
    )
    table.add_column("source", no_wrap=True, max_width=40)
    for name in ("documents", "tokens", "bytes per token", "median tokens", "longest", "left out"):
        table.add_column(name, justify="right")
    rows = [*statistics["sources"]]
    if len(rows) > 1:
        rows.append({"source": "all", **statistics["total"]})
    for row in rows:
        quantiles = row["document_tokens"]["quantiles"]
        left_out = sum(row["rejected"].values()) + sum(row["filtered"].values())
        ratio = row["bytes_per_token"]
        table.add_row(
            _tail(row["source"], 40),
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            f"{ratio:.2f}" if ratio else "–",
            f"{quantiles.get('0.5', 0):,}",
            f"{quantiles.get('1', 0):,}",
            f"{left_out:,}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    left_out_by_reason = {**statistics["total"]["rejected"], **statistics["total"]["filtered"]}
    for reason, count in left_out_by_reason.items():
        console.print(f"left out: {count:,} × {reason}", highlight=False)
    if manifest.rejected["records"]:
        console.print(f"examples: {prefix}.rejects.jsonl", highlight=False)


def _tail(text: str, characters: int) -> str:
    return text if len(text) <= characters else "…" + text[1 - characters :]
