"""The caption of each figure, formed from the numbers alone, whatever the result."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_slm.analysis.baseline import find_baseline
from megatron_slm.analysis.run_folder import PROCESSED, Run
from megatron_slm.analysis.selection_figures import BY_POSITION, BY_REFERENCE_LOSS, selecting
from megatron_slm.analysis.style import short_count
from megatron_slm.selection.alarms import reference_overtaken

EQUAL_NATS = 0.005
"""Smaller differences of a validation loss are called equal: other seeds alone move small runs by
more."""


@dataclass(frozen=True)
class Outcome:
    """A run's line in the summary. Losses in nats per token; None = not measured or not reached."""

    run: Run
    loss: float | None
    """The last that was validated."""
    not_final: str
    """What to say of `loss` where it is not the final one: "last, at step 60 of 120"; else empty.
    """
    processed: float | None
    selected: float | None
    tokens_per_second: float | None
    tokens_to_baseline: float | None
    """Processed tokens at which this run's validation loss first was at or below the baseline's
    last one."""
    measured: bool
    """Whether this run is measured against the baseline: it shares its data, model and start."""


def outcomes(runs: Sequence[Run], corpus: str | None) -> list[Outcome]:
    """One line of the summary for each run."""
    name = f"validation/{corpus}/loss"
    baseline = find_baseline(runs, corpus)
    goal = baseline.run.last(name) if baseline.run else None
    return [
        Outcome(
            run,
            run.last(name),
            run.not_final(name),
            _reached(run, PROCESSED),
            _reached(run, "tokens/selected"),
            _median(run, "throughput/tokens_per_second"),
            tokens_to_reach(run, name, goal) if baseline.measures(run) else None,
            baseline.measures(run),
        )
        for run in runs
    ]


def tokens_to_reach(run: Run, name: str, goal: float | None) -> float | None:
    """Processed tokens where the loss first is at or below `goal`, linear between validations.

    None when it never is.
    """
    if goal is None:
        return None
    x, y = run.series(name)
    below = np.nonzero(y <= goal)[0]
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - goal) / (y[i - 1] - y[i]))


def validation(runs: Sequence[Run], corpus: str) -> str:
    """Who is lowest at the last token count that every run reached, and where the others stand.

    A run that failed or was killed does not hold the others back: it is compared only if it came as
    far as they did.
    """
    curves = [(run, *run.series(f"validation/{corpus}/loss")) for run in runs]
    curves = [curve for curve in curves if len(curve[1])]
    lasting = [curve for curve in curves if not curve[0].state.is_broken_off] or curves
    common = min(x[-1] for _, x, _ in lasting)
    short = [run.name for run, x, _ in curves if x[-1] < common]
    curves = [curve for curve in curves if curve[1][-1] >= common]
    losses = [(float(np.interp(common, x, y)), run.name) for run, x, y in curves]
    losses.sort(key=lambda pair: pair[0])
    best, name = losses[0]
    where = f"After {short_count(common)} processed tokens"
    missing = [f"{_list(short)} did not come so far"] if short else []
    if len(losses) == 1:
        alone = f"{where} the loss of {name} on {corpus} is {best:.3f} nats per token"
        return f"{'; '.join([alone, *missing])}."
    level = [other for loss, other in losses[1:] if loss - best < EQUAL_NATS]
    behind = [
        f"{other} is {loss - best:.3f} higher"
        for loss, other in losses[1:]
        if loss - best >= EQUAL_NATS
    ]
    first = f"{name} has the lowest loss on {corpus}, {best:.3f} nats per token"
    if level:
        first = (
            f"{_list([name, *level])} are level on {corpus} at {best:.3f} nats per token (less "
            f"than {EQUAL_NATS} apart)"
        )
    return (
        f"{where} {'; '.join([first, *behind, *missing])}. One run each: how much chance moves "
        "these numbers is not measured here."
    )


def unfinished(runs: Sequence[Run]) -> str:
    """Which runs did not come to their end, and how they ended; empty when all did."""
    sentences = [
        f"{run.name}: {run.state.description}" for run in runs if not run.state.is_finished
    ]
    return f"Not finished: {'; '.join(sentences)}." if sentences else ""


def training(runs: Sequence[Run]) -> str:
    """How rejected tokens fared, and whether the model has overtaken its reference.

    One sentence or two for each run that selects.
    """
    sentences = []
    for run in runs:
        if run.is_plain:
            continue
        parts, overtaken = _reference_gap(run)
        rejected = run.series("loss/rejected")[1]
        if len(rejected) > 1:
            start, end = _end_means(rejected)
            sentence = f"the loss of rejected tokens went from {start:.2f} to {end:.2f} nats"
            if end > start + EQUAL_NATS:
                sentence += (
                    " (a rise is expected under selective training; an unbounded one is not)"
                )
            parts.append(sentence)
        if parts:
            sentences.append(f"{run.name}: {'; '.join(parts)}.")
        if overtaken:
            sentences.append(f"{run.name}: {overtaken}")
    return " ".join(sentences) or "All tokens are trained on in every run shown."


def _reference_gap(run: Run) -> tuple[list[str], str | None]:
    """Where the model stands beside the reference on all tokens.

    The second is the warning for a run that ranks tokens to its end and has overtaken its
    reference.
    """
    x, all_ = run.series("loss/all")
    x_reference, reference = run.series("loss/reference")
    shared, first, second = np.intersect1d(x, x_reference, return_indices=True)
    if not len(shared):
        return [], None
    all_start, all_end = _end_means(all_[first])
    reference_start, reference_end = _end_means(reference[second])
    start, end = all_start - reference_start, all_end - reference_end
    when = "at the end" if run.state.is_finished else "at its last logged steps"
    if shared[-1] < x[-1]:  # an online reference is let go when the selection ends
        when = "when its loss was last computed"
    side = "ahead of" if end > 0 else "behind"
    gap = f"on all tokens the reference is {abs(end):.2f} nats {side} the model {when}"
    at_start = f"{abs(start):.2f} {'ahead' if start > 0 else 'behind'} at the start"
    if run.selection_ended or not run.ranks_in_nats:
        return [f"{gap}, {at_start}"], None
    return [f"{gap}, {at_start}"], reference_overtaken(all_end, reference_end)


def threshold(runs: Sequence[Run]) -> str:
    sentences = []
    for run in runs:
        values = run.series("selection/threshold_nats")[1]
        kept = run.series("selection/kept_fraction")[1]
        if run.is_plain or (not len(kept) and not len(values)):
            continue
        parts = []
        if len(kept):
            parts.append(f"kept {kept.mean():.1%} of the competing tokens on average")
        if len(values) and run.ranks_in_nats:
            start, end = _end_means(values)
            parts.append(f"its threshold went from {start:.3f} to {end:.3f} nats")
        sentences.append(f"{run.name} {' and '.join(parts)}")
    return ". ".join(sentences) + "."


def by_reference_loss(runs: Sequence[Run]) -> str:
    """Which classes of reference loss the choice prefers at the end."""
    sentences = []
    for _, run in selecting(runs, BY_REFERENCE_LOSS):
        rate_Q = run.vectors(BY_REFERENCE_LOSS)[1][-1]
        if not np.isfinite(rate_Q).any():
            continue
        low, high = int(np.nanargmin(rate_Q)), int(np.nanargmax(rate_Q))
        if rate_Q[high] - rate_Q[low] < 0.05:
            sentences.append(
                f"{run.name} selects all classes of reference loss alike ({rate_Q[low]:.0%} to "
                f"{rate_Q[high]:.0%})"
            )
        else:
            sentences.append(
                f"{run.name} selects {rate_Q[high]:.0%} of class {high + 1}, its most, and "
                f"{rate_Q[low]:.0%} of class {low + 1}, its least, of {len(rate_Q)} classes of "
                "reference loss (1 = the easiest tokens for the reference)"
            )
    return ". ".join(sentences) + "."


def by_position(runs: Sequence[Run]) -> str:
    sentences = []
    for _, run in selecting(runs, BY_POSITION):
        rates = run.vectors(BY_POSITION)[1][-1]
        if np.isfinite(rates).any():
            sentences.append(
                f"{run.name} selects between {np.nanmin(rates):.0%} and {np.nanmax(rates):.0%} at "
                f"the {len(rates)} places of a sequence"
            )
    return ". ".join(sentences) + "."


def optimization(runs: Sequence[Run]) -> str:
    sentences = []
    for run in runs:
        norm = run.series("optimizer/grad_norm")[1]
        limit = run.setting("optimizer.clip_grad_norm", 0)
        if len(norm):
            sentence = (
                f"{run.name}: median gradient norm {np.median(norm):.3g}, largest {norm.max():.3g}"
            )
            if limit:
                clipped = np.mean(norm > limit)
                sentence += f"; {clipped:.0%} of the recorded steps were clipped at {limit:g}"
            sentences.append(sentence)
    return ". ".join(sentences) + "."


def throughput(runs: Sequence[Run]) -> str:
    speeds = [(run, _median(run, "throughput/tokens_per_second")) for run in runs]
    baseline = find_baseline(runs)
    base_speed = next((speed for run, speed in speeds if run is baseline.run), None)
    sentences = []
    for run, speed in speeds:
        if not speed:
            continue
        sentence = f"{run.name} {short_count(speed)} tokens per second"
        if base_speed and baseline.run and run is not baseline.run and baseline.measures(run):
            sentence += f" ({speed / base_speed - 1:+.0%} beside {baseline.run.name})"
        mfu = run.series("throughput/mfu_fraction")[1]
        if len(mfu):
            sentence += f", MFU {np.median(mfu):.1%}"
        sentences.append(sentence)
    return "Median speed: " + "; ".join(sentences) + "." + _slowest_ranks(runs)


def _slowest_ranks(runs: Sequence[Run]) -> str:
    """Which rank most often kept the others waiting, for each run of several processes."""
    sentences = []
    for run in runs:
        ranks = run.series("throughput/slowest_rank", x="step")[1]
        excess = run.series("throughput/slowest_rank_excess_seconds", x="step")[1]
        if not len(ranks) or len(excess) != len(ranks):
            continue
        rank = int(np.bincount(ranks.astype(int)).argmax())
        is_slowest = ranks == rank
        sentences.append(
            f" The slowest rank of {run.name} was most often rank {rank}, in {is_slowest.sum()} of "
            f"{len(is_slowest)} log intervals; it worked {np.median(excess[is_slowest]):.2g} s per "
            "step longer than the others (median)."
        )
    return "".join(sentences)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _end_means(values: np.ndarray) -> tuple[float, float]:
    """Means of the first and of the last tenth: single steps are noise."""
    width = max(len(values) // 10, 1)
    return float(values[:width].mean()), float(values[-width:].mean())


def _median(run: Run, name: str) -> float | None:
    values = run.series(name, x="step")[1]
    return float(np.median(values)) if len(values) else None


def _reached(run: Run, name: str) -> float | None:
    values = [
        record[name]
        for record in run.training + run.validation
        if isinstance(record.get(name), (int, float))
    ]
    if not values and name == "tokens/selected" and run.is_plain:
        return _reached(run, PROCESSED)
    return float(max(values)) if values else None
