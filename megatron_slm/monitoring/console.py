"""Metrics for a person at a terminal: a progress bar with rate, time left and losses; plain lines
in a log file.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from megatron_slm.monitoring.progress_line import Part

_STYLE = {"info": "none", "warning": "yellow", "error": "bold red"}
_TITLE_LONGEST = 24
_RANKS = {
    "time left": 1,
    "loss": 3,
    "kept": 4,
    "speed": 5,
    "title": 6,
    "other losses": 7,
    "learning rate": 8,
    "gradient norm": 9,
}
"""The higher a part's number, the sooner it is left out on a narrow terminal; step and total have
0, the bar 2.
"""


def _raise_again() -> NoReturn:
    """The BrokenPipeError that is being handled, for whoever writes to several sinks."""
    raise


class ConsoleSink:
    """A progress bar where `stream` is a terminal, otherwise one plain line per record (good in a
    SLURM log).

    On a narrow terminal step, total, time left and bar stay longest (progress_line.py).
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        title: str = "train",
        stream: TextIO | None = None,
    ) -> None:
        from rich.console import Console

        self._total_steps = total_steps
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        # rich would end the process here, but a `tee` killed by Ctrl-C must not stop the run before
        # its checkpoint.
        vars(self._console)["on_broken_pipe"] = _raise_again
        self._title = title if len(title) <= _TITLE_LONGEST else title[: _TITLE_LONGEST - 1] + "…"
        self._progress: tuple[Progress, TaskID] | None = None
        """The bar and its only task, where the stream is a terminal."""
        if self._console.is_terminal:
            self._progress = self._open_progress(title, start_step)

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        """The short table at the start of a run: what runs, on what, how long."""
        if self._progress is None:
            self._console.print(title, *lines_of_table(rows), sep="\n", markup=False)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title, title_justify="left", show_header=False, box=None, padding=(0, 2)
        )
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")  # a path that is cut cannot be copied
        for name, value in rows.items():
            table.add_row(name, Text(str(value)))
        self._console.print(table)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        if record.get("kind", "train") == "validation":
            self._console.print(f"step {step}  {describe_validation(record)}", markup=False)
        elif self._progress is None:
            self._console.print(
                f"step {step}/{self._total_steps}  {_describe_training(record)}", markup=False
            )
        else:
            progress, task = self._progress
            progress.update(task, completed=step, parts=self._line(record, step))

    def message(self, text: str, level: str = "info") -> None:
        prefix = "" if level == "info" else f"{level}: "
        self._console.print(prefix + text, style=_STYLE[level], markup=False)

    def close(self, state: str = "done", exit_code: int = 0) -> None:
        if self._progress is not None:
            progress, _ = self._progress
            progress.stop()

    def _open_progress(self, title: str, start_step: int) -> "tuple[Progress, TaskID]":
        from megatron_slm.monitoring.progress_line import fitted_progress

        progress = fitted_progress(self._console)
        task = progress.add_task(
            title,
            total=self._total_steps,
            completed=start_step,
            parts=self._line({}, start_step),
        )
        progress.start()
        return progress, task

    def _line(self, record: Mapping[str, Any], step: int) -> "list[Part]":
        from megatron_slm.monitoring.progress_line import BAR, Part

        done = Part(0, f"{step}/{self._total_steps}")
        figures = [Part(_RANKS[name], text) for name, text in _figures(record)]
        return [Part(_RANKS["title"], self._title), BAR, done, *figures]


def lines_of_table(rows: Mapping[str, Any]) -> list[str]:
    """Plain lines "  name  value" with the values below each other."""
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]


def describe_losses(record: Mapping[str, Any]) -> str:
    """The losses of a training record: loss 3.4120 (all 3.702, reference 3.105); empty when it has
    none.
    """
    return " ".join(text for name, text in _figures(record) if name in ("loss", "other losses"))


def _describe_training(record: Mapping[str, Any]) -> str:
    """loss 3.412 (all 3.702, reference 3.1)  kept 60%  lr 3e-4  |grad| 0.81  0:01:22 left"""
    return "  ".join(text for _, text in _figures(record)).replace("  (", " (")


def _figures(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name in _RANKS, text) of what a training record has, in the order of a line."""
    parts = []
    loss = _number(record, "loss/selected", "loss/all")
    if loss is not None:
        parts.append(("loss", f"loss {loss:.4f}"))
        if others := _other_losses(record):
            parts.append(("other losses", f"({', '.join(others)})"))
    if (kept := _number(record, "selection/kept_fraction")) is not None:
        parts.append(("kept", f"kept {kept:.0%}"))
    if (rate := _number(record, "optimizer/learning_rate")) is not None:
        parts.append(("learning rate", f"lr {rate:.2e}"))
    if (norm := _number(record, "optimizer/grad_norm")) is not None:
        parts.append(("gradient norm", f"|grad| {norm:.3g}"))
    if (speed := _number(record, "throughput/tokens_per_second")) is not None:
        parts.append(("speed", f"{short_number(speed)} tokens/s"))
    if (left := _number(record, "throughput/eta_seconds")) is not None:
        parts.append(("time left", f"{format_duration(left)} left"))
    return parts


def _other_losses(record: Mapping[str, Any]) -> list[str]:
    """The losses shown beside that of the selected tokens; none if every token is trained on."""
    if "loss/selected" not in record:
        return []
    named = {name: _number(record, f"loss/{name}") for name in ("all", "reference")}
    return [f"{name} {loss:.3f}" for name, loss in named.items() if loss is not None]


def describe_validation(record: Mapping[str, Any]) -> str:
    """The losses of a validation record: validation/curated loss 3.3129"""
    losses = {
        name.removesuffix("/loss"): value
        for name, value in record.items()
        if name.startswith("validation/") and name.endswith("/loss") and value is not None
    }
    if not losses:
        return "validation: no loss"
    return "  ".join(f"{name} loss {value:.4f}" for name, value in losses.items())


def _number(record: Mapping[str, Any], *names: str) -> float | None:
    return next(
        (record[name] for name in names if isinstance(record.get(name), (int, float))), None
    )


def short_number(value: float) -> str:
    """12345678 -> 12.3M"""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """3725 -> 1:02:05; from a day on, 2d 3:00:00."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock
