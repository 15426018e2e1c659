"""Pictures of what was selected: by how hard the reference finds a token, by position, by corpus.

Q: 20 classes of reference loss that hold equally many tokens each. R: records over training.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_slm.analysis.figures import X_LABELS
from megatron_slm.analysis.run_folder import PROCESSED, Run
from megatron_slm.analysis.style import (
    MUTED,
    axis_in_tokens,
    colour,
    dash,
    house_style,
    label_lines,
    new_figure,
)

BY_REFERENCE_LOSS = "selection/rate_by_reference_loss"
BY_POSITION = "selection/rate_by_position"
BY_CORPUS = "selection/rate_by_corpus"


def selecting(runs: Sequence[Run], name: str) -> list[tuple[int, Run]]:
    """(place, run) of the runs that choose among tokens and recorded the metric."""
    return [
        (index, run)
        for index, run in enumerate(runs)
        if not run.is_plain and len(run.vectors(name)[0])
    ]


def rate_over_time(runs: Sequence[Run]) -> Figure | None:
    """Heat map: share of tokens selected, by class of reference loss (bottom = easy for the reference), over training."""
    shown = [
        pair
        for pair in selecting(runs, BY_REFERENCE_LOSS)
        if len(pair[1].vectors(BY_REFERENCE_LOSS)[0]) > 1
    ]
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), share_y=True)
        for axes, (_, run) in zip(panels, shown):
            x_R, rate_RQ = run.vectors(BY_REFERENCE_LOSS)
            quantile_edges = np.linspace(0, 100, rate_RQ.shape[1] + 1)
            # cividis is made for colour-blind readers; rasterized keeps the file small.
            mesh = axes.pcolormesh(
                _edges(x_R),
                quantile_edges,
                rate_RQ.T,
                vmin=0,
                vmax=1,
                cmap="cividis",
                rasterized=True,
            )
            axes.grid(False)
            axes.set_title(run.name)
            axis_in_tokens(axes.xaxis, X_LABELS[PROCESSED])
        panels[0].set_ylabel("percentile of reference loss")
        figure.colorbar(
            mesh, ax=panels, label="share selected (0..1)", pad=0.02
        ).outline.set_visible(False)
        return figure


def final_rate(runs: Sequence[Run]) -> Figure | None:
    """The last record: share selected in each class of reference loss; bars, one panel per run, edges in nats below."""
    shown = selecting(runs, BY_REFERENCE_LOSS)
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), height=3.0, share_y=True)
        for axes, (index, run) in zip(panels, shown):
            rate_Q = run.vectors(BY_REFERENCE_LOSS)[1][-1]
            edges = run.vectors(BY_REFERENCE_LOSS + "_edges_nats")[1]
            classes = np.arange(len(rate_Q))
            axes.bar(classes + 0.5, rate_Q, width=0.86, color=colour(index))
            kept = run.last("selection/kept_fraction")
            if kept is not None:
                axes.axhline(kept, color=MUTED, linewidth=1, linestyle="--")
            ticks = np.linspace(0, len(rate_Q), 5).astype(int)
            axes.set_xticks(
                ticks,
                [f"{edges[-1][tick]:.2g}" for tick in ticks]
                if len(edges)
                else [f"{100 * tick // len(rate_Q)} %" for tick in ticks],
            )
            axes.set_title(
                run.name if kept is None else f"{run.name} (dashed: kept {kept:.0%} in all)"
            )
            axes.set_ylim(0, 1.02)
            axes.grid(axis="x", visible=False)
        panels[0].set_ylabel("share selected (0..1)")
        figure.supxlabel(
            "reference loss in nats, 20 classes of equally many tokens", fontsize=9, color=MUTED
        )
        return figure


def rate_by_position(runs: Sequence[Run]) -> Figure | None:
    """The last record: share selected by place in the sequence."""
    return _by_bucket(runs, BY_POSITION, "place in the sequence (0 = start, 1 = end)", "line")


def rate_by_corpus(runs: Sequence[Run]) -> Figure | None:
    """The last record: share selected of each training corpus; None with fewer than two corpora."""
    if all(run.vectors(BY_CORPUS)[1].shape[1] < 2 for run in runs):
        return None
    return _by_bucket(runs, BY_CORPUS, "training corpus", "bars")


def _by_bucket(runs: Sequence[Run], name: str, label: str, kind: str) -> Figure | None:
    shown = selecting(runs, name)
    if not shown:
        return None
    with house_style():
        figure, (axes,) = new_figure(height=2.8)
        ends = []
        for order, (index, run) in enumerate(shown):
            rate_n = run.vectors(name)[1][-1]
            if kind == "line":
                places = (np.arange(len(rate_n)) + 0.5) / len(rate_n)
                axes.plot(
                    places,
                    rate_n,
                    color=colour(index),
                    linestyle=dash(index),
                    marker="o",
                    markersize=3,
                )
                ends.append(
                    (run.name, colour(index), float(places[-1]), float(np.nan_to_num(rate_n[-1])))
                )
            else:
                width = 0.8 / len(shown)
                axes.bar(
                    np.arange(len(rate_n)) - 0.4 + width * (order + 0.5),
                    rate_n,
                    width=0.92 * width,
                    color=colour(index),
                    label=run.name,
                )
                _name_corpora(axes, run, len(rate_n))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(label)
        axes.set_ylabel("share selected (0..1)")
        if kind == "line":
            label_lines(axes, ends)
        else:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure


def _name_corpora(axes, run: Run, corpora: int) -> None:
    prefixes = run.setting("data.train") or []
    names = [str(prefix).rstrip("/").rsplit("/", 1)[-1] for prefix in prefixes]
    axes.set_xticks(
        range(corpora), names if len(names) == corpora else [f"corpus {i}" for i in range(corpora)]
    )
    axes.grid(axis="x", visible=False)


def _edges(x_R: np.ndarray) -> np.ndarray:
    """Cell borders [R + 1] half-way between the records."""
    middle = (x_R[1:] + x_R[:-1]) / 2
    return np.concatenate([[max(2 * x_R[0] - middle[0], 0)], middle, [2 * x_R[-1] - middle[-1]]])
