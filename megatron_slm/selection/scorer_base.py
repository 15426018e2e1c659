"""The interface of every scorer. B: sequences, S: tokens of a sequence on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_slm.selection.schedule import TrainingProgress

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_slm.selection.scope import Population
    from megatron_slm.selection.select import Selection

Columns = Mapping[str, "Tensor"]
"""Name -> one value per token."""


class Scorer:
    """Subclass it when a function is not enough, and override the first method that differs.

    needs    names of the columns it reads.
    kind     "score": the top keep_fraction is kept. "choice": made of several such choices. "mask":
             the scorer decides alone. "weight": soft weights. The last two have no use for
             keep_fraction.
    choices  how many thresholds one choice searches (scope running_threshold tracks one only).
    """

    name: str = "unnamed"
    needs: frozenset[str] = frozenset({"loss"})
    kind: str = "score"
    choices: int = 1

    def __call__(self, columns: Columns, progress: TrainingProgress) -> Tensor:
        """The score of every token, fp32 BS; NaN where there is none. Higher is better."""
        raise NotImplementedError(
            f"scorer {self.name!r} is not a plain score of each token; use scorer.choose"
        )

    def rank(
        self,
        columns: Columns,
        eligible_BS: Tensor,
        population: Population,
        progress: TrainingProgress,
    ) -> Tensor:
        """The score, when it depends on the other tokens of the population (a z-score, a mean over
        the sequence).
        """
        return self(columns, progress)

    def choose(
        self,
        columns: Columns,
        eligible_BS: Tensor,
        keep_fraction: float,
        population: Population,
        progress: TrainingProgress,
    ) -> Selection:
        """The choice, which training calls whatever the kind.

        Every rank of the population's groups must call it.
        """
        return population.top(
            self.rank(columns, eligible_BS, population, progress), eligible_BS, keep_fraction
        )

    @property
    def uses_keep_fraction(self) -> bool:
        return self.kind in ("score", "choice")

    @property
    def is_static(self) -> bool:
        """Whether the choice is known before the model runs: no forward pass first for
        global_batch, and a head on kept rows only.
        """
        return not self.needs & {"loss", "entropy"}

    @property
    def keeps_fixed_weight(self) -> bool:
        """Whether the sum of the weights is known before the model's losses: an exact share of the
        tokens with a score, or a static choice.

        It assumes that the losses do not decide which tokens have a score. Override it in a scorer
        whose number of chosen tokens moves.
        """
        return self.kind == "score" or self.is_static

    def kept_fraction_at_most(self, keep_fraction: float) -> float:
        """The largest share of the eligible tokens that a choice can keep; 1.0 where only the data
        decide.

        keep_fraction is the last value of the configured schedule. The planner counts backward
        work by it; what is really kept is in the metric selection/kept_fraction.
        """
        return keep_fraction if self.uses_keep_fraction else 1.0

    def check_scope(self, scope: str) -> None:
        """Raises ValueError when the scorer cannot work in this scope."""
        if scope == "running_threshold" and self.choices > 1:
            raise ValueError(
                f"scorer {self.name} makes {self.choices} choices, but scope running_threshold "
                "tracks one threshold; use another scope"
            )
