"""One line of progress that fits its terminal. No torch.

What a person needs most stays longest as the terminal gets narrower.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table

_GAP = 2
_BAR_PART = 6
"""The bar takes one sixth of the terminal's width, within the next two."""
_BAR_NARROWEST = 5
_BAR_WIDEST = 24


class Part(NamedTuple):
    """A piece of the line. Parts stand in the order they are given and go in the order of `rank`,
    the highest first.
    """

    rank: int
    text: str


BAR = Part(2, "")
"""Where the bar stands in the line. It goes after everything but the parts of rank 0 and 1."""


def fitting(parts: Sequence[Part], width: int) -> list[Part]:
    """The parts of lowest rank that fit into `width` characters, in their order."""
    kept: list[Part] = []
    used_width = -_GAP
    for part in sorted(parts, key=lambda part: part.rank):
        part_width = _GAP + (_bar_width(width) if part is BAR else len(part.text))
        if used_width + part_width > width and kept:
            break
        kept.append(part)
        used_width += part_width
    return [part for part in parts if part in kept]


def fitted_progress(console: Console, **options) -> Progress:
    """A rich Progress of one line; give a task its `parts` (with BAR among them), and change them
    with `update`.
    """
    return Progress(_FittedLine(console), console=console, refresh_per_second=2, **options)


class _FittedLine(ProgressColumn):
    """The whole line as one column: rich's own columns shrink together, until none of them can be
    read.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Table:
        width = self._console.width
        line = Table.grid(padding=(0, _GAP, 0, 0))
        cells = []
        for part in fitting(task.fields["parts"], width):
            line.add_column(no_wrap=True)
            cells.append(self._bar(task, width) if part is BAR else part.text)
        line.add_row(*cells)
        return line

    def _bar(self, task: Task, width: int) -> ProgressBar:
        return ProgressBar(total=task.total, completed=task.completed, width=_bar_width(width))


def _bar_width(width: int) -> int:
    return min(_BAR_WIDEST, max(_BAR_NARROWEST, width // _BAR_PART))
