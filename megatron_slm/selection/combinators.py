"""Scorers made of scorers, and those that compare a token with the rest of its population.

B, S and columns: see scorers.py.

A child is given by its name or by a mapping: {name: reference_entropy}, or
{name: own_loss, keep_fraction: 0.8} where a choice is made.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from megatron_slm.selection.schedule import build_schedule, check_keep_fraction
from megatron_slm.selection.scorers import (
    Scorer,
    build_scorer,
    child_scorer,
    excess_loss,
    register_scorer,
)

if TYPE_CHECKING:
    from megatron_slm.selection.select import Selection


def _ranking_child(setting) -> Scorer:
    child = child_scorer(setting)
    if child.kind != "score":
        raise ValueError(
            f"its child {child.name!r} does not rank tokens; use one that gives a score, such as "
            "excess_loss"
        )
    return child


@register_scorer("reverse")
class Reverse(Scorer):
    """-score of the child: the opposite choice, a baseline that should hurt.

    Tokens without a score stay without.
    """

    def __init__(self, of: str | Mapping = "excess_loss"):
        self.child = _ranking_child(of)
        self.needs = self.child.needs

    def rank(self, columns, eligible_BS, population, progress):
        return -self.child.rank(columns, eligible_BS, population, progress)

    def __call__(self, columns, progress):
        return -self.child(columns, progress)


@register_scorer("weighted_sum")
class WeightedSum(Scorer):
    """sum_c weight_c * (score_c - mean) / deviation; mean and deviation over the tokens of the
    population that have a score.
    """

    def __init__(self, of: Mapping[str, float] | Sequence[Mapping[str, Any]]):
        if isinstance(of, Mapping):
            parts: list[Mapping[str, Any]] = [
                {"name": name, "weight": weight} for name, weight in of.items()
            ]
        else:
            parts = list(of)
        if not parts or not all(isinstance(part, Mapping) and "weight" in part for part in parts):
            raise ValueError(
                "of must map scorers to weights, {excess_loss: 1.0, own_entropy: -0.5}, or list "
                f"them with their options, [{{name: history, column: old_loss, weight: 0.5}}, "
                f"...]; got {of!r}"
            )
        self.weights = [float(part["weight"]) for part in parts]
        self.children = [_ranking_child(_without_weight(part)) for part in parts]
        self.needs = frozenset().union(*(child.needs for child in self.children))

    def rank(self, columns, eligible_BS, population, progress):
        total = 0.0
        for child, weight in zip(self.children, self.weights, strict=True):
            score_BS = child.rank(columns, eligible_BS, population, progress).detach().float()
            mean, deviation = population.moments(score_BS, eligible_BS.bool() & score_BS.isfinite())
            total = total + weight * (score_BS - mean) / deviation
        return total


def _without_weight(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "weight"}


@register_scorer("rho_loss")
class RhoLoss(Scorer):
    """RHO-LOSS: whole sequences, by the mean of L_theta - L_holdout over their eligible tokens.

    The exact token-level choice would cut the last sequence in two; a sequence of which any token
    is chosen is kept whole, so less than one sequence is kept beyond keep_fraction.
    """

    def __init__(self, column: str = "reference_loss"):
        self.column = column
        self.needs = frozenset({"loss", column})

    keeps_fixed_weight = False  # the total depends on which sequence is completed beyond the share

    def rank(self, columns, eligible_BS, population, progress):
        excess_BS = excess_loss(columns["loss"], columns[self.column])
        known_BS = eligible_BS.bool() & excess_BS.isfinite()
        sum_B1 = population.of_sequence(excess_BS.where(known_BS, 0.0))
        mean_B1 = sum_B1 / population.of_sequence(known_BS)
        return mean_B1.float().expand_as(excess_BS).where(known_BS, math.nan)

    def check_scope(self, scope):
        if scope == "sequence":
            raise ValueError(
                "scorer rho_loss ranks whole sequences, which cannot compete with themselves; use "
                "another scope than sequence"
            )

    def choose(self, columns, eligible_BS, keep_fraction, population, progress):
        self.check_scope(population.scope)
        score_BS = self.rank(columns, eligible_BS, population, progress)
        chosen = population.top(score_BS, eligible_BS, keep_fraction)
        whole_BS = (population.of_sequence(chosen.mask) > 0) & score_BS.isfinite()
        return replace(population.chosen(whole_BS, score_BS.isfinite()), threshold=chosen.threshold)


class _OfChoices(Scorer):
    """Children that each choose their own top share; a child's keep_fraction overrides the
    configured one.
    """

    kind = "choice"

    def __init__(self, of: Sequence[str | Mapping] = ("reference_loss", "reference_entropy")):
        if isinstance(of, str | Mapping) or len(of) < 2:
            raise ValueError(f"of must be a list of at least two scorers, got {of!r}")
        self.children: list[Scorer] = []
        self.keep_fractions: list[float | None] = []
        for setting in of:
            options: dict[str, Any] = {"name": setting}
            if isinstance(setting, Mapping):
                options = dict(setting)
            child_fraction = options.pop("keep_fraction", None)
            self.keep_fractions.append(
                None if child_fraction is None else check_keep_fraction(child_fraction)
            )
            self.children.append(build_scorer(**options))
        self.needs = frozenset().union(*(child.needs for child in self.children))
        self.choices = sum(child.choices for child in self.children)

    def _masks(self, columns, eligible_BS, keep_fraction, population, progress):
        self.check_scope(population.scope)
        for child, child_fraction in zip(self.children, self.keep_fractions, strict=True):
            fraction = keep_fraction if child_fraction is None else child_fraction
            yield child.choose(columns, eligible_BS, fraction, population, progress).mask

    def _children_keep_at_most(self, keep_fraction: float) -> list[float]:
        return [
            child.kept_fraction_at_most(keep_fraction if child_fraction is None else child_fraction)
            for child, child_fraction in zip(self.children, self.keep_fractions, strict=True)
        ]


@register_scorer("intersection")
class Intersection(_OfChoices):
    """Tokens that every child chooses: fewer than keep_fraction.

    Default: Rho-1's self-reference, lowest L_ref and lowest H_ref.
    """

    def choose(self, columns, eligible_BS, keep_fraction, population, progress) -> Selection:
        masks = self._masks(columns, eligible_BS, keep_fraction, population, progress)
        return population.chosen(reduce(operator.and_, masks), eligible_BS)

    def kept_fraction_at_most(self, keep_fraction):
        return min(self._children_keep_at_most(keep_fraction))


@register_scorer("union")
class Union(_OfChoices):
    """Tokens that any child chooses: more than keep_fraction. Default: Rho-1's self-reference."""

    def choose(self, columns, eligible_BS, keep_fraction, population, progress) -> Selection:
        masks = self._masks(columns, eligible_BS, keep_fraction, population, progress)
        return population.chosen(reduce(operator.or_, masks), eligible_BS)

    def kept_fraction_at_most(self, keep_fraction):
        return min(1.0, sum(self._children_keep_at_most(keep_fraction)))


@register_scorer("band")
class Band(Scorer):
    """A quantile band: skip the top skip_fraction of the child's ranking (outliers, noise) and
    keep the next keep_fraction.

    Exactly kept_tokens(skip + keep) - kept_tokens(skip) tokens of every population.
    """

    kind = "choice"
    choices = 2
    keeps_fixed_weight = True  # the difference of two exact shares

    def __init__(self, of: str | Mapping = "excess_loss", skip_fraction: float = 0.1):
        if not 0.0 < skip_fraction < 1.0:
            raise ValueError(f"skip_fraction must be above 0 and below 1, got {skip_fraction!r}")
        self.child = _ranking_child(of)
        self.skip_fraction = skip_fraction
        self.needs = self.child.needs

    def choose(self, columns, eligible_BS, keep_fraction, population, progress) -> Selection:
        self.check_scope(population.scope)
        reach = self.skip_fraction + keep_fraction
        if reach > 1.0 + 1e-9:
            raise ValueError(
                f"skip_fraction {self.skip_fraction} and keep_fraction {keep_fraction} add to more "
                "than 1; lower one of them"
            )
        score_BS = self.child.rank(columns, eligible_BS, population, progress)
        skipped = population.top(score_BS, eligible_BS, self.skip_fraction)
        reached = population.top(score_BS, eligible_BS, min(reach, 1.0))
        mask_BS = reached.mask & ~skipped.mask
        return replace(reached, mask=mask_BS, kept=reached.kept - skipped.kept)


@register_scorer("mixed_with_clm")
class MixedWithClm(Scorer):
    """lambda * CLM + (1 - lambda) * SLM, as weights.

    They are lambda on every eligible token, plus (1 - lambda) * eligible / kept on the chosen ones.
    Divided by their sum this is lambda * (mean over all tokens) + (1 - lambda) * (mean over the
    chosen). clm_weight (lambda) is a number from 0 to 1 or a schedule in tokens.
    """

    def __init__(
        self, of: str | Mapping | Scorer = "excess_loss", clm_weight: float | Mapping = 0.1
    ):
        self.child = child_scorer(of)
        if self.child.kind == "weight":
            raise ValueError(
                f"its child {self.child.name!r} gives soft weights; mix plain CLM with a 0/1 choice"
            )
        self.clm_weight = build_schedule(clm_weight, "clm_weight", allow_zero=True)
        self.needs = self.child.needs
        self.choices = self.child.choices
        self.kind = "weight"

    @property
    def uses_keep_fraction(self) -> bool:
        return self.child.uses_keep_fraction

    @property
    def keeps_fixed_weight(self) -> bool:
        return self.child.keeps_fixed_weight

    def kept_fraction_at_most(self, keep_fraction):
        if self.clm_weight.end > 0.0:
            return 1.0  # every token has a weight
        return self.child.kept_fraction_at_most(keep_fraction)

    def check_scope(self, scope):
        self.child.check_scope(scope)

    def choose(self, columns, eligible_BS, keep_fraction, population, progress) -> Selection:
        clm_weight = self.clm_weight(progress.tokens)
        chosen = self.child.choose(columns, eligible_BS, keep_fraction, population, progress)
        if clm_weight == 0.0:
            return chosen
        # Counted apart from chosen.eligible: plain CLM also trains on tokens without a score.
        trained = population.chosen(eligible_BS.bool(), eligible_BS)
        selective = (1.0 - clm_weight) * trained.eligible / max(chosen.kept, 1)
        weight_BS = clm_weight * eligible_BS.float() + selective * chosen.mask.float()
        return replace(
            chosen,
            mask=trained.mask,
            weight=weight_BS,
            preferred=chosen.mask,
            counted=trained.counted,
        )
