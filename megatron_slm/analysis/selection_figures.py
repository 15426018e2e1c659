"""Pictures of what was selected: by how hard the reference finds a token, by position, by corpus.

Q: 20 classes of reference loss that hold equally many tokens each. R: records over training.
"""

import itertools
import os
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
UPRIGHT_NAMES = 5
"""More names of corpora than these are written aslant, or they would run into each other."""


def selecting(runs: Sequence[Run], name: str) -> list[tuple[int, Run]]:
    """(place, run) of the runs that choose among tokens and recorded the metric."""
    return [
        (index, run)
        for index, run in enumerate(runs)
        if not run.is_plain and len(run.vectors(name)[0])
    ]


def rate_over_time(runs: Sequence[Run]) -> Figure | None:
    """Heat map over training: share of tokens selected, by class of reference loss.

    The classes that the reference finds easy are at the bottom.
    """
    shown = [
        pair
        for pair in selecting(runs, BY_REFERENCE_LOSS)
        if len(pair[1].vectors(BY_REFERENCE_LOSS)[0]) > 1
    ]
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), share_y=True)
        for axes, (_, run) in zip(panels, shown, strict=True):
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
    """The last record: share selected in each class of reference loss.

    There is a panel of bars for each run, with the edges of the classes in nats below.
    """
    shown = selecting(runs, BY_REFERENCE_LOSS)
    if not shown:
        return None
    with house_style():
        figure, panels = new_figure(len(shown), height=3.0, share_y=True)
        for axes, (index, run) in zip(panels, shown, strict=True):
            rate_Q = run.vectors(BY_REFERENCE_LOSS)[1][-1]
            edges = run.vectors(BY_REFERENCE_LOSS + "_edges_nats")[1]
            classes = np.arange(len(rate_Q))
            axes.bar(classes + 0.5, rate_Q, width=0.86, color=colour(index))
            kept = run.last("selection/kept_fraction")
            if kept is not None:
                axes.axhline(kept, color=MUTED, linewidth=1, linestyle="--")
            ticks = np.linspace(0, len(rate_Q), 5).astype(int)
            labels = [f"{100 * tick // len(rate_Q)} %" for tick in ticks]
            if len(edges):
                labels = [f"{edges[-1][tick]:.2g}" for tick in ticks]
            axes.set_xticks(ticks, labels)
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
    shown = selecting(runs, BY_POSITION)
    if not shown:
        return None
    with house_style():
        figure, (axes,) = new_figure(height=2.8)
        ends = []
        for index, run in shown:
            rate_n = run.vectors(BY_POSITION)[1][-1]
            places = (np.arange(len(rate_n)) + 0.5) / len(rate_n)
            axes.plot(
                places,
                rate_n,
                color=colour(index),
                linestyle=dash(index),
                marker="o",
                markersize=3,
            )
            end = float(np.nan_to_num(rate_n[-1]))
            ends.append((run.name, colour(index), float(places[-1]), end))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("place in the sequence (0 = start, 1 = end)")
        axes.set_ylabel("share selected (0..1)")
        label_lines(axes, ends)
        return figure


def rate_by_corpus(runs: Sequence[Run]) -> Figure | None:
    """The last rate of each training corpus, each under its own name; None where no run has two."""
    rates = [(index, run, rates_of_corpora(run)) for index, run in enumerate(runs)]
    shown = [(index, run, rate) for index, run, rate in rates if rate and not run.is_plain]
    if all(len(rate) < 2 for _, _, rate in shown):
        return None
    corpora = list(dict.fromkeys(itertools.chain(*(rate for _, _, rate in shown))))
    width = 0.8 / len(shown)
    with house_style():
        figure, (axes,) = new_figure(height=2.8)
        for index, run, rate in shown:
            places = []
            for corpus in rate:
                # The bars of a corpus stand around its name, as many as runs read it.
                readers = [other_index for other_index, _, has in shown if corpus in has]
                offset = readers.index(index) - (len(readers) - 1) / 2
                places.append(corpora.index(corpus) + width * offset)
            axes.bar(
                places,
                list(rate.values()),
                width=0.92 * width,
                color=colour(index),
                label=run.name,
            )
        steep = len(corpora) > UPRIGHT_NAMES
        axes.set_xticks(
            range(len(corpora)),
            shortest_names(corpora),
            rotation=30 if steep else 0,
            ha="right" if steep else "center",
        )
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("training corpus")
        axes.set_ylabel("share selected (0..1)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure


def rates_of_corpora(run: Run) -> dict[str, float]:
    """Corpus -> share of its tokens selected, as last recorded.

    A corpus is known by its absolute prefix, the same in every run.
    """
    recorded = dict.fromkeys(
        name for line in run.training for name in line if name.startswith(BY_CORPUS + "/")
    )
    rates = {name.removeprefix(BY_CORPUS + "/"): run.last(name) for name in recorded}
    if not rates and len(run.vectors(BY_CORPUS)[0]):
        # Older runs have a list in the order of data.train.
        rate_n = run.vectors(BY_CORPUS)[1][-1]
        prefixes = run.setting("data.train") or []
        if len(prefixes) != len(rate_n):
            prefixes = [f"corpus {number + 1} of {run.name}" for number in range(len(rate_n))]
        rates = dict(zip(map(str, prefixes), rate_n, strict=True))
    return {
        os.path.abspath(prefix): float(rate)
        for prefix, rate in rates.items()
        if rate is not None and np.isfinite(rate)
    }


def shortest_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of different paths, in whole parts, that tell them apart."""
    parts = [path.split(os.sep) for path in paths]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(part[-length:] == own[-length:] for part in parts) > 1:
            length += 1
        names.append(os.sep.join(own[-length:]))
    return names


def _edges(x_R: np.ndarray) -> np.ndarray:
    """Cell borders [R + 1] half-way between the records."""
    middle = (x_R[1:] + x_R[:-1]) / 2
    return np.concatenate([[max(2 * x_R[0] - middle[0], 0)], middle, [2 * x_R[-1] - middle[-1]]])
