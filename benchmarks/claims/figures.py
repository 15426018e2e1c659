"""Pictures of stored results, in the look of the reports."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claims.analysis import LOSS, PROCESSED, SELECTED, Arm, Comparison, Results
from benchmarks.claims.intervals import t_quantile
from megatron_slm.analysis.style import (
    LINE,
    MUTED,
    axis_in_tokens,
    colour,
    dash,
    house_style,
    label_lines,
    new_figure,
)

SHOWN = ("plain", "slm", "random", "mix", "slm_mix", "curated_only", "own_loss", "reversed")
"""Arms of the figure of curves; the figure of differences has all."""


def curves(results: Results, pair: str) -> Figure:
    """Loss on the target against tokens processed, tokens selected and FLOPs: means of the seeds
    with their 95 % intervals. FLOPs begin at those of the reference and of scoring.
    """
    arms = [arm for name, arm in results.arms(pair).items() if name in SHOWN]
    with house_style():
        figure, panels = new_figure(3, share_y=True, height=3.6)
        labels = ("tokens processed", "tokens selected", "FLOPs, reference and scoring included")
        ends: list[list[tuple[str, str, float, float]]] = [[], [], []]
        for index, arm in enumerate(arms):
            losses = arm.points(LOSS)
            xs = (
                arm.points(PROCESSED).mean(0),
                arm.points(SELECTED).mean(0),
                _flops(arm),
            )
            for axes, x, end in zip(panels, xs, ends, strict=True):
                _band(axes, x, losses, index)
                end.append((arm.label, colour(index), float(x[-1]), float(losses.mean(0)[-1])))
        for axes, label in zip(panels, labels, strict=True):
            axis_in_tokens(axes.xaxis, label)
        panels[0].set_ylabel("loss on the target (nats per token)")
        label_lines(panels[2], ends[2])
        return figure


def lead(results: Results, pair: str) -> Figure:
    """Loss on the target less that of the baseline at the same processed tokens: means of the
    differences of the same seed, with their 95 % intervals.

    Of arms that were validated where the baseline was.
    """
    arms = results.arms(pair)
    baseline = arms.pop(results.declared["baseline"])
    places = baseline.points(PROCESSED)
    with house_style():
        figure, [axes] = new_figure(1, height=4.2)
        ends: list[tuple[str, str, float, float]] = []
        for index, arm in enumerate(arms.values()):
            if not np.array_equal(arm.points(PROCESSED), places):
                continue
            differences = arm.points(LOSS) - baseline.points(LOSS)
            _band(axes, places[0], differences, index)
            end = (float(places[0, -1]), float(differences[:, -1].mean()))
            ends.append((arm.label, colour(index), *end))
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axis_in_tokens(axes.xaxis, "tokens processed")
        axes.set_ylabel("loss less that of plain (nats per token)")
        label_lines(axes, ends)
        return figure


def _flops(arm: Arm) -> np.ndarray:
    processed = arm.points(PROCESSED).mean(0)
    cost = arm.flops
    return cost["reference"] + cost["scoring"] + cost["run"] * processed / processed[-1]


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, index: int) -> None:
    """A line of means in the middle of its interval."""
    mean = values.mean(0)
    axes.plot(x, mean, color=colour(index), linestyle=dash(index))
    seeds = len(values)
    if seeds > 1:
        half = t_quantile(0.95, seeds - 1) * values.std(0, ddof=1) / np.sqrt(seeds)
        axes.fill_between(x, mean - half, mean + half, color=colour(index), alpha=0.15, lw=0)


def differences(results: Results, arms: Collection[str] = ()) -> Figure:
    """The paired difference of each arm's final loss from the arm it is compared with.

    arms: their names; empty = all of them.
    """
    with house_style():
        found = {}
        for pair in results.pairs:
            compared = _compared(results, pair)
            found[pair] = [each for each in compared if not arms or each.arm.name in arms]
        rows = max(map(len, found.values()))
        figure, panels = new_figure(len(found), height=0.9 + 0.3 * rows)
        for axes, (pair, compared) in zip(panels, found.items(), strict=True):
            for place, comparison in enumerate(compared):
                _interval(axes, len(compared) - place, comparison)
            axes.axvline(0, color=MUTED, linewidth=0.8)
            axes.set_yticks(range(len(compared), 0, -1), [each.arm.label for each in compared])
            axes.set_ylim(0.4, len(compared) + 0.6)
            axes.set_title(pair)
            axes.set_xlabel("difference of the loss (nats per token)")
        return figure


def _compared(results: Results, pair: str) -> list[Comparison]:
    """The declared comparisons; contrasts are in the page's table."""
    declared = results.declared["arms"]
    return [
        each
        for each in results.comparisons(pair)
        if each.difference is not None
        and each.baseline.name
        == (declared[each.arm.name]["against"] or results.declared["baseline"])
    ]


def _interval(axes: Axes, height: float, comparison: Comparison) -> None:
    estimate = comparison.difference
    assert estimate is not None
    is_clear = estimate.half_width < abs(estimate.mean)
    shade = MUTED
    if is_clear:
        shade = colour(2 if estimate.mean < 0 else 1)
    axes.plot([estimate.mean], [height], "o", color=shade, markersize=4)
    if np.isfinite(estimate.half_width):
        axes.plot([estimate.low, estimate.high], [height, height], color=shade)


def keep_fractions(results: Results, pair: str) -> Figure:
    """The difference from plain training over the share of tokens that was kept."""
    compared = sorted(_compared(results, pair), key=lambda each: each.arm.kept_fraction)
    with house_style():
        figure, [axes] = new_figure(1, height=3.2)
        x = [each.arm.kept_fraction for each in compared]
        means = [each.difference.mean for each in compared if each.difference]
        halves = [each.difference.half_width for each in compared if each.difference]
        axes.errorbar(x, means, yerr=halves, marker="o", color=colour(0), ecolor=LINE, capsize=3)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("share of the tokens that was kept")
        axes.set_ylabel("loss less that of plain (nats per token)")
        return figure


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same file for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with house_style():  # its salt makes the ids in the file the same
        figure.savefig(path, metadata={"Date": None})
