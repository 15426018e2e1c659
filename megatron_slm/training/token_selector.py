"""Which tokens of a micro-batch carry the loss: the selection room, fed with a batch's columns and the model's losses.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from collections.abc import Sequence

import torch

from megatron_slm.config.schema import SelectionConfig
from megatron_slm.data.batch import Batch
from megatron_slm.parallel import Groups
from megatron_slm.selection import (
    Population,
    RunningThreshold,
    Selection,
    TrainingProgress,
    build_schedule,
)
from megatron_slm.selection.diagnostics import describe
from megatron_slm.selection.metric_sums import MetricSums
from megatron_slm.selection.rules import MODEL_COLUMNS
from megatron_slm.training.scorer_settings import choice_rules


class TokenSelector:
    """Chooses tokens under one configuration. State (of running_threshold only) goes into the checkpoint."""

    def __init__(
        self, settings: SelectionConfig, groups: Groups, *, sequence_length: int, corpora: int
    ):
        self.rules = choice_rules(settings)
        self.scorer = self.rules.scorer
        self.keep_fraction = build_schedule(settings.keep_fraction)
        self.scope, self.groups = settings.scope, groups
        self.sequence_length, self.corpora = sequence_length, corpora
        self.running = RunningThreshold() if settings.scope == "running_threshold" else None
        self.extras = tuple(sorted(self.scorer.needs & MODEL_COLUMNS - {"loss"}))
        self.head_on_selected_rows = self.rules.head_on_selected_rows
        self.weight_needed_ahead = False
        """Whether the divisor of a step must be known before its first backward: in a mixture of experts (model/router.py)."""

    @property
    def needs_whole_step(self) -> bool:
        """Whether every loss of the optimizer step must be known before the first backward."""
        return self.rules.needs_whole_step(weight_needed_ahead=self.weight_needed_ahead)

    @property
    def knows_weight_ahead(self) -> bool:
        """Whether the losses cannot change the sum of the weights."""
        return self.rules.knows_weight_ahead

    def weight_ahead(self, batch: Batch, progress: TrainingProgress) -> torch.Tensor:
        """The sum of the weights that `choose` will give this micro-batch (float64, 0-d), found with zeros for losses; needs knows_weight_ahead."""
        unknown = {
            name: torch.zeros(batch.tokens_BS.shape, device=batch.tokens_BS.device)
            for name in ("loss", *self.extras)
        }
        return self.choose_from(
            self._population(batch.token_id_BS), batch, unknown, progress
        ).weight_sum

    @property
    def loss_of_selected_only(self) -> bool:
        """Whether nobody computes the loss of tokens that are not selected, so that nothing can be said of it."""
        return self.rules.loss_of_selected_only

    def choose(
        self, batch: Batch, outputs: dict[str, torch.Tensor], progress: TrainingProgress
    ) -> Selection:
        """The choice on one micro-batch; every rank of the last stage's dp_cp group calls it.

        `outputs` are the model's per-token values (none of which a static scorer needs); nothing here is differentiated.
        """
        return self.choose_from(self._population(batch.token_id_BS), batch, outputs, progress)

    def choose_from(
        self,
        population: Population,
        batch: Batch,
        outputs: dict[str, torch.Tensor],
        progress: TrainingProgress,
    ) -> Selection:
        """The choice on one micro-batch in a population of the caller's."""
        return self.scorer.choose(
            self._columns(batch, outputs),
            batch.loss_mask_BS > 0,
            self.keep_fraction(progress.tokens),
            population,
            progress,
        )

    def choose_step(
        self,
        batches: Sequence[Batch],
        outputs: Sequence[dict[str, torch.Tensor]],
        progress: TrainingProgress,
    ) -> list[Selection]:
        """The choice on all micro-batches of a step: at once under scope global_batch and cut back into micro-batches, else one by one."""
        if self.scope != "global_batch":
            return [
                self.choose(batch, output, progress)
                for batch, output in zip(batches, outputs, strict=True)
            ]
        all_columns = [
            self._columns(batch, output) for batch, output in zip(batches, outputs, strict=True)
        ]
        columns = {name: torch.cat([part[name] for part in all_columns]) for name in all_columns[0]}
        eligible = torch.cat([batch.loss_mask_BS > 0 for batch in batches])
        selection = self.scorer.choose(
            columns,
            eligible,
            self.keep_fraction(progress.tokens),
            self._population(columns["token_id"]),
            progress,
        )
        return selection.split([batch.tokens_BS.shape[0] for batch in batches])

    def describe(
        self,
        batch: Batch,
        outputs: dict[str, torch.Tensor],
        selection: Selection,
        progress: TrainingProgress,
    ) -> MetricSums:
        """Sums and counts of a choice, for metrics."""
        columns = self._columns(batch, outputs)
        eligible_BS = batch.loss_mask_BS > 0
        try:
            score_BS = self.scorer(columns, progress) if self.scorer.uses_keep_fraction else None
        except (
            NotImplementedError
        ):  # a scorer that weighs tokens against each other has no score of each alone
            score_BS = None
        return describe(
            columns,
            score_BS,
            eligible_BS,
            selection,
            sequence_length=self.sequence_length,
            corpora=self.corpora,
            loss_of_selected_only=self.loss_of_selected_only,
        )

    def finish_step(self, progress: TrainingProgress) -> MetricSums:
        """Move a running threshold on; returns its measured deviation from the exact choice."""
        if self.running is None or not self.groups.is_last_stage:
            return {}
        return self.running.finish_step(self.keep_fraction(progress.tokens), self.groups.dp_cp)

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"running": self.running.state_dict() if self.running else None}

    def load_state_dict(self, state: dict) -> None:
        """Restore; a run that newly uses running_threshold starts without a past."""
        if self.running is not None and state.get("running"):
            self.running.load_state_dict(state["running"])

    def _columns(self, batch: Batch, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            **batch.columns,
            **{name: value.detach() for name, value in outputs.items()},
            "token_id": batch.token_id_BS,
            "position": batch.position_ids_BS,
            "corpus_id": batch.corpus_id_B[:, None].expand_as(batch.token_id_BS),
        }

    def _population(self, token_id_BS: torch.Tensor) -> Population:
        # Every rank holds micro-batches of one shape, so no rank needs to ask the others for their sizes.
        return Population(
            self.scope,
            token_id_BS,
            group=self.groups.dp_cp,
            cp_group=self.groups.cp,
            running=self.running,
            capacity=token_id_BS.numel(),
        )
