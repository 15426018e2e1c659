"""What a scorer, a scope and the head's rows decide before any token is seen; no torch.

Training decides by these rules what to run, and the planner what to count, so that both agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_slm.selection.schedule import build_schedule
from megatron_slm.selection.scorers import Scorer, build_scorer

MODEL_COLUMNS = frozenset({"loss", "entropy"})
"""Columns that the model itself computes in its forward pass."""
BATCH_COLUMNS = frozenset({"token_id", "position", "corpus_id"})
"""Columns that every batch has."""
ONLINE_COLUMNS = frozenset({"reference_loss", "reference_entropy"})
"""Columns that a reference model gives when it is run in the same step."""


@dataclass(frozen=True)
class ChoiceRules:
    """One configured choice.

    scope       one of SCOPES (populations.py).
    head_rows   the tokens whose rows the loss head computes in the training pass: "all",
                "selected", or "auto", which is "selected" where a forward pass has given every
                loss anyway.
    """

    scorer: Scorer
    scope: str
    head_rows: str = "auto"

    @property
    def stored_columns(self) -> frozenset[str]:
        """Columns that a score store or an online reference gives, not the model or the batch."""
        return frozenset(self.scorer.needs) - MODEL_COLUMNS - BATCH_COLUMNS

    @property
    def known_before_head(self) -> bool:
        """Whether the choice can be made before the training pass's head runs."""
        of_whole_step = self.scope == "global_batch" and self.scorer.kind != "mask"
        return self.scorer.is_static or of_whole_step

    @property
    def head_on_selected_rows(self) -> bool:
        """Whether the training pass's head computes selected tokens only.

        auto never takes the losses of unselected tokens away from the metrics: it is "selected"
        only where a forward pass before the step has given them already.
        """
        if self.head_rows == "auto":
            return self.known_before_head and not self.scorer.is_static
        return self.head_rows == "selected"

    @property
    def loss_of_selected_only(self) -> bool:
        """Whether the loss of unselected tokens is never computed, so that metrics of it are
        omitted.
        """
        return self.head_on_selected_rows and self.scorer.is_static and self.scorer.name != "none"

    @property
    def knows_weight_ahead(self) -> bool:
        """Whether the losses cannot change the sum of the weights."""
        tracks_threshold = self.scope == "running_threshold" and self.scorer.uses_keep_fraction
        return self.scorer.keeps_fixed_weight and not tracks_threshold

    def needs_whole_step(self, *, weight_needed_ahead: bool) -> bool:
        """Whether one choice is made for the whole optimizer step, before its first backward.

        `weight_needed_ahead`: the divisor of a step must be known before its first backward, as the
        auxiliary losses of a mixture of experts require (model/router.py).
        """
        if self.scope == "global_batch" and self.scorer.kind != "mask":
            return True
        return weight_needed_ahead and not self.knows_weight_ahead

    def runs_forward_first(self, *, weight_needed_ahead: bool) -> bool:
        """Whether every step begins with a forward pass whose losses the choice reads."""
        chosen_first = (
            self.needs_whole_step(weight_needed_ahead=weight_needed_ahead)
            or self.head_on_selected_rows
        )
        return chosen_first and not self.scorer.is_static

    def check(self) -> None:
        """Raises ValueError for a scope that the scorer cannot work in, and rows known too late."""
        self.scorer.check_scope(self.scope)
        if self.head_rows == "selected" and not self.known_before_head:
            raise ValueError(
                f"selection.head_rows is selected, but scorer {self.scorer.name} reads the model's "
                f"own losses, which under scope {self.scope} are known only after the head; "
                "use head_rows auto, a static scorer, or scope global_batch"
            )


def configured_scorer(
    name: str, options: Mapping[str, object] | None = None, clm_weight: float | Mapping = 0.0
) -> Scorer:
    """The scorer a configuration names, with plain loss mixed in where clm_weight is not 0.

    Raises ValueError for an unknown name, a wrong option, or a clm_weight that is none.
    """
    scorer = build_scorer(name, **(options or {}))
    build_schedule(clm_weight, "clm_weight", allow_zero=True)
    if clm_weight == 0.0:
        return scorer
    return build_scorer("mixed_with_clm", of=scorer, clm_weight=clm_weight)
