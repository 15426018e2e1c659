"""The look of every figure: colours that colour-blind readers tell apart, units, named lines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito 2008; yellow is left out, it is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
INK = "#1f2933"
MUTED = "#5b6570"
LINE = "#d9dde3"
_SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "megatron-slm",  # the same figure is the same file
}
_SMOOTH_FROM = 40
_LABEL_POINTS = 11
WIDTH = 8.8
MOST_COLUMNS = 3


@contextmanager
def house_style() -> Iterator[None]:
    # The stub lists the names of all settings as literals; this is a plain mapping of some of them.
    with rc_context(_SETTINGS):  # type: ignore[arg-type]
        yield


def new_figure(
    panels: int = 1, *, height: float = 3.2, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, at most three in a row of `height` inches.

    Every figure is equally wide, so that text has one size. It is made without pyplot, so no global
    state and no display are involved.
    """
    columns = min(panels, MOST_COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share_y).reshape(-1)
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, list(axes[:panels])


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Solid for the first seven lines, then other dashes: no two of 28 lines look alike."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def axis_in_tokens(axis, label: str) -> None:
    axis.set_label_text(label)
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def short_count(value: float) -> str:
    """1_500_000 -> 1.5M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over 1/25 of the points, where there are enough to be noisy.

    NaN stays out of the mean.
    """
    if len(values) < _SMOOTH_FROM:
        return values
    half = max(len(values) // 50, 1)
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array(list(map(np.nanmean, windows)))


def draw_line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    color: str,
    *,
    dashes: str = "-",
    marker: str = "",
    noisy: bool = True,
) -> None:
    """A line; noisy ones, with many points, as a pale raw line under a moving average."""
    smoothed = smooth(y) if noisy else y
    if smoothed is not y:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(
        x,
        smoothed,
        color=color,
        linestyle=dashes,
        marker=marker or ("o" if len(x) == 1 else ""),
        markersize=4,
    )


def label_lines(axes: Axes, labels: Sequence[tuple[str, str, float, float]]) -> None:
    """Names beside the ends of lines, pushed apart where they would overlap.

    labels: name, colour, and the x and y of the line's end.
    """
    if not labels:
        return
    low, high = axes.get_ylim()
    scale = axes.get_yaxis().get_transform()
    low, high, *ends = scale.transform(np.array([low, high, *(y for _, _, _, y in labels)], float))
    heights = _apart(
        (np.array(ends) - low) / (high - low),
        gap=_LABEL_POINTS / (72 * axes.get_window_extent().height / axes.figure.dpi),
    )
    for (name, color, x, _), height in zip(labels, heights, strict=True):
        axes.annotate(
            name,
            xy=(x, height),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            color=color,
            fontsize=8.5,
            annotation_clip=False,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.6},
        )


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """The nearest heights at least `gap` apart, in the same order, inside 0..1 where they fit."""
    order = np.argsort(heights, kind="stable")
    placed = np.clip(heights[order], 0, 1)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed -= max(placed[-1] - 1, 0)
    for i in range(len(placed) - 2, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    placed[0:] += max(-placed[0], 0)
    result = np.empty_like(placed)
    result[order] = placed
    return result
