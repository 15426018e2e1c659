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
_FATES = (
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
            _lines(axes, runs, name, x, marker="o")
            axis_in_tokens(axes.xaxis, X_LABELS[x])
        panels[0].set_ylabel(f"loss on {corpus} (nats per token)")
        return figure


def training_loss(runs: Sequence[Run]) -> Figure | None:
    """Training loss of selected, all and rejected tokens, and the reference's on the same tokens: a
    panel per run.
    """
    shown = [run for run in runs if any(len(run.series(name)[0]) for name, _, _ in _FATES)]
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), share_y=True)
        for axes, run in zip(panels, shown, strict=True):
            ends = []
            for name, label, color in _FATES:
                x, y = run.series(name)
                # A plain run selects everything: "selected" and "all" would be one line drawn
                # twice.
                if len(x) and not (
                    run.is_plain
                    and name in ("loss/selected", "loss/rejected")
                    and len(run.series("loss/all")[0])
                ):
                    draw_line(axes, x, y, color)
                    ends.append((label, color, x, y))
            axes.set_title(run.name)
            axis_in_tokens(axes.xaxis, X_LABELS[PROCESSED])
            axes.label_ends = ends
        panels[0].set_ylabel("training loss (nats per token)")
        _label_all(panels)
        return figure


def threshold_and_kept_fraction(runs: Sequence[Run]) -> Figure | None:
    """The score a token had to reach, and the share of tokens that were kept, of runs that select."""
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
    metrics = tuple(
        metric
        for metric in metrics
        if any(len(_series(run, metric[0], only_selecting)[0]) for run in runs)
    )
    if not metrics:
        return None
    with house_style():
        figure, panels = new_figure(len(metrics), height=3.0)
        for axes, (name, title, unit) in zip(panels, metrics, strict=True):
            _lines(axes, runs, name, PROCESSED, only_selecting=only_selecting)
            axes.set_title(title)
            axes.set_ylabel(unit)
            axis_in_tokens(axes.xaxis, X_LABELS[PROCESSED])
            if name == "selection/kept_fraction":
                axes.set_ylim(0, 1.02)
            elif from_zero:
                axes.set_ylim(bottom=0)
        _label_all(panels)
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
) -> None:
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
    axes.label_ends = ends
    if name.startswith("validation/"):
        _label_all([axes])
    if not ends:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)


def _label_all(panels: Sequence[Axes]) -> None:
    """Label once all lines are drawn and limits are set: only then is it known where they end."""
    for axes in panels:
        label_lines(
            axes,
            [
                (name, color, float(x[-1]), float(smooth(y)[-1]))
                for name, color, x, y in axes.label_ends
            ],
        )
