"""Pictures of runs over training. Each function returns a matplotlib Figure, or None where the runs
hold nothing to show.

A run keeps its colour in every figure: that of its place in the list.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_slm.analysis.run_folder import PROCESSED, SELECTED, Run
from megatron_slm.analysis.style import (
    MUTED,
    axis_in_tokens,
    colour,
    dash,
    draw_line,
    house_style,
    label_lines,
    new_figure,
    smooth,
)

X_LABELS = {PROCESSED: "tokens processed", SELECTED: "tokens selected (trained on)"}
THRESHOLD = "selection/threshold_nats"
LineEnd = tuple[str, str, np.ndarray, np.ndarray]
"""Label, colour, x and y of a line that gets its name at its end."""
# Metric, label and colour of the losses by selection.
_LOSSES = (
    ("loss/selected", "selected", colour(0)),
    ("loss/all", "all", "#1f2933"),
    ("loss/rejected", "rejected", colour(1)),
    ("loss/reference", "reference", colour(2)),
)


def validation_loss(runs: Sequence[Run], corpus: str) -> Figure | None:
    """Plain validation loss of every run against processed and against selected tokens."""
    name = f"validation/{corpus}/loss"
    if not any(len(run.series(name)[0]) for run in runs):
        return None
    with house_style():
        figure, panels = new_figure(2, share_y=True, height=3.4)
        for axes, x in zip(panels, (PROCESSED, SELECTED), strict=True):
            _label_all([axes], [_lines(axes, runs, name, x, marker="o")])
            axis_in_tokens(axes.xaxis, X_LABELS[x])
        panels[0].set_ylabel(f"loss on {corpus} (nats per token)")
        return figure


def training_loss(runs: Sequence[Run]) -> Figure | None:
    """Training loss of selected, all and rejected tokens, and the reference's on the same tokens.

    There is a panel for each run.
    """
    names = [name for name, _, _ in _LOSSES]
    shown = [run for run in runs if _has_any(run, names)]
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), share_y=True)
        ends = []
        for axes, run in zip(panels, shown, strict=True):
            ends.append(_losses_of(axes, run))
            axes.set_title(run.name)
            axis_in_tokens(axes.xaxis, X_LABELS[PROCESSED])
        panels[0].set_ylabel("training loss (nats per token)")
        _label_all(panels, ends)
        return figure


def _has_any(run: Run, names: Sequence[str]) -> bool:
    return any(len(run.series(name)[0]) for name in names)


def _losses_of(axes: Axes, run: Run) -> list[LineEnd]:
    """Draw one run's losses; returns the lines for their labels."""
    ends = []
    for name, label, color in _LOSSES:
        x, y = run.series(name)
        # A plain run selects everything: "selected" and "all" would be one line drawn twice.
        of_choice = name in ("loss/selected", "loss/rejected")
        repeats = run.is_plain and of_choice and _has_any(run, ["loss/all"])
        if len(x) and not repeats:
            draw_line(axes, x, y, color)
            ends.append((label, color, x, y))
    return ends


def threshold_and_kept_fraction(runs: Sequence[Run]) -> Figure | None:
    """The score a token had to reach, and the share of tokens that was kept, of selecting runs."""
    return _two_panels(
        runs,
        (THRESHOLD, "threshold", "score of the last kept token (nats)"),
        ("selection/kept_fraction", "kept fraction", "kept share of competing tokens (0..1)"),
        only_selecting=True,
    )


def learning_rate_and_grad_norm(runs: Sequence[Run]) -> Figure | None:
    return _two_panels(
        runs,
        ("optimizer/learning_rate", "learning rate", "learning rate"),
        ("optimizer/grad_norm", "gradient norm", "global norm before clipping"),
    )


def throughput(runs: Sequence[Run]) -> Figure | None:
    return _two_panels(
        runs,
        ("throughput/tokens_per_second", "speed", "tokens per second, all processes"),
        ("throughput/step_seconds", "step time", "seconds per optimizer step"),
        from_zero=True,
    )


def _two_panels(
    runs: Sequence[Run],
    *metrics: tuple[str, str, str],
    only_selecting: bool = False,
    from_zero: bool = False,
) -> Figure | None:
    def is_recorded(name: str) -> bool:
        return any(len(_series(run, name, only_selecting)[0]) for run in runs)

    shown = [metric for metric in metrics if is_recorded(metric[0])]
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), height=3.0)
        ends = []
        for axes, (name, title, unit) in zip(panels, shown, strict=True):
            ends.append(_lines(axes, runs, name, PROCESSED, only_selecting=only_selecting))
            axes.set_title(title)
            axes.set_ylabel(unit)
            axis_in_tokens(axes.xaxis, X_LABELS[PROCESSED])
            if name == "selection/kept_fraction":
                axes.set_ylim(0, 1.02)
            elif from_zero:
                axes.set_ylim(bottom=0)
        _label_all(panels, ends)
        return figure


def _series(
    run: Run, name: str, only_selecting: bool, x: str = PROCESSED
) -> tuple[np.ndarray, np.ndarray]:
    left_out = (only_selecting and run.is_plain) or (name == THRESHOLD and not run.ranks_in_nats)
    return (np.zeros(0), np.zeros(0)) if left_out else run.series(name, x)


def _lines(
    axes: Axes,
    runs: Sequence[Run],
    name: str,
    x: str,
    *,
    marker: str = "",
    only_selecting: bool = False,
) -> list[LineEnd]:
    """Draw a metric of every run; returns the lines for their labels."""
    ends = []
    for index, run in enumerate(runs):
        xs, ys = _series(run, name, only_selecting, x)
        if len(xs):
            draw_line(
                axes,
                xs,
                ys,
                colour(index),
                dashes=dash(index),
                marker=marker,
                noisy=name != "optimizer/learning_rate",
            )
            ends.append((run.name, colour(index), xs, ys))
    if not ends:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
    return ends


def _label_all(panels: Sequence[Axes], ends: Sequence[list[LineEnd]]) -> None:
    """Label once all lines are drawn and limits are set: only then is it known where they end."""
    for axes, lines in zip(panels, ends, strict=True):
        labels = [(name, color, float(x[-1]), float(smooth(y)[-1])) for name, color, x, y in lines]
        label_lines(axes, labels)
