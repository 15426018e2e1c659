"""What the rows of an experiment say: arms with intervals, paired differences, costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims.collect import BY_CORPUS, Row, read_rows
from benchmarks.claims.experiment import FOLDER
from benchmarks.claims.intervals import Estimate, estimate, holm
from benchmarks.claims.noise import WORDS

RESULTS = FOLDER / "results"
PROCESSED, SELECTED, LOSS = 1, 2, 3
"""Places in a validation point, after the step."""


@dataclass(frozen=True)
class Arm:
    """The runs of one arm of one pair, by seed."""

    name: str
    label: str
    runs: Mapping[int, Row]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.runs)

    def final_losses(self) -> dict[int, float]:
        """Seed -> the last validation loss on the target, nats per token."""
        return {seed: run["validation"][-1][LOSS] for seed, run in self.runs.items()}

    @property
    def cpu_seconds(self) -> float:
        """Mean over seeds."""
        return float(np.mean([run["cpu_seconds"] for run in self.runs.values()]))

    @property
    def flops(self) -> dict[str, float]:
        """Mean FLOPs of the run, of its reference and of scoring."""
        names = ("run", "reference", "scoring")
        return {name: self._mean_flops(name) for name in names}

    def _mean_flops(self, name: str) -> float:
        return float(np.mean([run["flops"][name] for run in self.runs.values()]))

    def points(self, place: int) -> np.ndarray:
        """[seeds, validations] of one place of the validation points."""
        validations = np.array([self.runs[seed]["validation"] for seed in self.seeds], float)
        return validations[:, :, place]

    @property
    def kept_fraction(self) -> float:
        """Selected tokens over processed ones, whole runs."""
        return float(self.points(SELECTED)[:, -1].sum() / self.points(PROCESSED)[:, -1].sum())


@dataclass(frozen=True)
class Comparison:
    """An arm against another, differences of the same seed."""

    arm: Arm
    baseline: Arm
    difference: Estimate | None
    """Loss of the arm less that of the baseline, nats; None without a common seed, and for the
    baseline itself."""
    p_holm: float
    """Adjusted for all comparisons of the same experiment and pair."""
    tokens_ratio: Estimate | None
    """Tokens to reach the baseline's final loss, as a share of the baseline's; None where a seed
    never reached it."""
    reached: int
    """Seeds that reached it."""


class Results:
    """The stored numbers of one experiment."""

    def __init__(self, rows: Sequence[Row]):
        self.header = rows[0]
        self.declared: dict[str, Any] = self.header["declared"]
        self.rows = rows[1:]

    @classmethod
    def read(cls, name: str, folder: Path = RESULTS) -> "Results | None":
        """None where the experiment has no stored numbers."""
        path = folder / f"{name}.jsonl.gz"
        return cls(read_rows(path)) if path.is_file() else None

    @cached_property
    def pairs(self) -> list[str]:
        """Pairs with a finished arm: the declared ones, then a user's own text."""
        found = {row["pair"] for row in self.rows if row["kind"] == "arm"}
        declared = self.declared["pairs"]
        return [pair for pair in declared if pair in found] + sorted(found - set(declared))

    def arms(self, pair: str) -> dict[str, Arm]:
        """Arms with a finished run, in the order of the declaration."""
        found = {}
        for name, declared in self.declared["arms"].items():
            runs = {row["seed"]: row for row in self._rows_of(pair, "arm") if row["name"] == name}
            if runs:
                found[name] = Arm(name, declared["label"] or name, runs)
        return found

    def models(self, pair: str) -> dict[str, Arm]:
        """The base and the references."""
        names = ["base", *self.declared["models"]]
        found = {}
        for name in names:
            runs = {row["seed"]: row for row in self._rows_of(pair, "model") if row["name"] == name}
            if runs:
                found[name] = Arm(name, name, runs)
        return found

    def _rows_of(self, pair: str, kind: str) -> list[Row]:
        return [row for row in self.rows if row["pair"] == pair and row["kind"] == kind]

    def not_run(self, pair: str) -> list[str]:
        """Labels of declared arms without a finished run."""
        there = self.arms(pair)
        return [
            declared["label"] or name
            for name, declared in self.declared["arms"].items()
            if name not in there
        ]

    def comparisons(self, pair: str) -> list[Comparison]:
        """Every arm against the one it is declared to be compared with, then the contrasts."""
        arms = self.arms(pair)
        declared = self.declared["arms"]
        wanted = [(name, declared[name]["against"] or self.declared["baseline"]) for name in arms]
        for name, others in self.declared["contrasts"].items():
            wanted += [(name, other) for other in others]
        found = [
            compare(arms[name], arms[other])
            for name, other in wanted
            if name in arms and other in arms
        ]
        adjusted = holm([each.difference.p if each.difference else math.nan for each in found])
        return [
            Comparison(each.arm, each.baseline, each.difference, p, each.tokens_ratio, each.reached)
            for each, p in zip(found, adjusted, strict=True)
        ]


def compare(arm: Arm, baseline: Arm) -> Comparison:
    """The paired differences of two arms over the seeds that both have."""
    own, other = arm.final_losses(), baseline.final_losses()
    seeds = sorted(set(own) & set(other))
    if arm.name == baseline.name or not seeds:
        return Comparison(arm, baseline, None, math.nan, None, 0)
    ratios = []
    for seed in seeds:
        tokens = tokens_to_reach(arm.runs[seed]["validation"], other[seed])
        if tokens is not None:
            ratios.append(tokens / baseline.runs[seed]["validation"][-1][PROCESSED])
    return Comparison(
        arm,
        baseline,
        estimate([own[seed] - other[seed] for seed in seeds]),
        math.nan,
        estimate(ratios) if len(ratios) == len(seeds) else None,
        len(ratios),
    )


def tokens_to_reach(points: Sequence[Sequence[float]], loss: float) -> float | None:
    """Processed tokens where the loss is first at or below `loss`, linear between validations.

    None when it never is.
    """
    before = None
    for point in points:
        if point[LOSS] <= loss:
            if before is None:
                return float(point[PROCESSED])
            share = (before[LOSS] - loss) / (before[LOSS] - point[LOSS])
            return before[PROCESSED] + share * (point[PROCESSED] - before[PROCESSED])
        before = point
    return None


@dataclass(frozen=True)
class Found:
    """How well rejecting tokens finds planted documents, over the whole run of each seed. Those of
    `words` are no noise here: six in seven of their words are real.
    """

    kept: dict[str, Estimate]
    """Corpus -> share of its tokens that was selected."""
    precision: Estimate
    """Noise among the rejected tokens."""
    recall: Estimate
    """Rejected tokens among the noise."""
    noise_fraction: float
    """Noise among all tokens: the precision of rejecting at random."""


def found_noise(results: Results, pair: str, arm: Arm) -> Found | None:
    """None where the arm did not read the noise, or its runs did not report rates by corpus."""
    planted = results.declared["planted"]
    corpora = results.header["corpora"][pair]
    read = [name for name in results.declared["arms"][arm.name]["train"] if name in corpora]
    is_noise = np.array([name in planted and name != WORDS for name in read])
    rates = np.array([_mean_rates(arm.runs[seed], read) for seed in arm.seeds])
    if not is_noise.any() or np.isnan(rates).any():
        return None
    tokens = np.array([corpora[name]["tokens"] for name in read])
    rejected = tokens * (1 - rates)
    of_noise = rejected[:, is_noise].sum(1)
    all_rejected = rejected.sum(1)
    return Found(
        {name: estimate(rates[:, place].tolist()) for place, name in enumerate(read)},
        estimate((of_noise / np.where(all_rejected > 0, all_rejected, 1)).tolist()),
        estimate((of_noise / tokens[is_noise].sum()).tolist()),
        float(tokens[is_noise].sum() / tokens.sum()),
    )


def _mean_rates(run: Row, corpora: Sequence[str]) -> list[float]:
    """The share of each corpus's tokens that was selected, the mean of the log intervals.

    NaN where none was reported.
    """
    return [_mean_rate(run, corpus) for corpus in corpora]


def _mean_rate(run: Row, corpus: str) -> float:
    name = BY_CORPUS + corpus
    rates = [record[name] for record in run["training"] if name in record]
    return float(np.mean(rates)) if rates else math.nan
