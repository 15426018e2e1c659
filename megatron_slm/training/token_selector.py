"""Which tokens of a micro-batch carry the loss: applies the selection package to a batch's columns
and the model's losses.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
    """Selects tokens under one configuration.

    Its state (a running threshold, and where the selection has ended) goes into the checkpoint.
    """

    def __init__(
        self, settings: SelectionConfig, groups: Groups, *, sequence_length: int, corpora: int
    ):
        self.groups = groups
        self.sequence_length = sequence_length
        self.corpora = corpora
        self.ended_at_tokens: int | None = None
        """Processed tokens when the selection ended before the run; None while it goes on."""
        self._apply(settings)

    def _apply(self, settings: SelectionConfig) -> None:
        self.rules = choice_rules(settings)
        self.scorer = self.rules.scorer
        self.keep_fraction = build_schedule(settings.keep_fraction)
        self.scope = settings.scope
        self.running = RunningThreshold() if settings.scope == "running_threshold" else None
        self.extras = tuple(sorted(self.scorer.needs & MODEL_COLUMNS - {"loss"}))
        """Per-token values that the model must give beside its loss."""
        self.head_on_selected_rows = self.rules.head_on_selected_rows

    def end(self, tokens: int) -> None:
        """Choose every token from here on, as scorer none does; `tokens` were processed so far."""
        self.ended_at_tokens = tokens
        self._apply(SelectionConfig())

    def choose(
        self,
        batch: Batch,
        outputs: Mapping[str, Tensor],
        progress: TrainingProgress,
        population: Population | None = None,
    ) -> Selection:
        """The choice on one micro-batch, in the configured scope or another population.

        `outputs` are the model's per-token values (none of which a static scorer needs); nothing
        here is differentiated. Every rank of the last stage's dp_cp group calls it.
        """
        return self.scorer.choose(
            self._columns(batch, outputs),
            batch.loss_mask_BS > 0,
            self.keep_fraction(progress.tokens),
            population or self._population(batch.token_id_BS),
            progress,
        )

    def choose_step(
        self,
        batches: Sequence[Batch],
        outputs: Sequence[Mapping[str, Tensor]],
        progress: TrainingProgress,
    ) -> list[Selection]:
        """The choice on all micro-batches of a step: at once under scope global_batch and cut back
        into micro-batches, else one by one.
        """
        if self.scope != "global_batch":
            return [
                self.choose(batch, output, progress)
                for batch, output in zip(batches, outputs, strict=True)
            ]
        parts = [
            self._columns(batch, output) for batch, output in zip(batches, outputs, strict=True)
        ]
        columns = {}
        for name in parts[0]:
            columns[name] = torch.cat([part[name] for part in parts])
        selection = self.scorer.choose(
            columns,
            torch.cat([batch.loss_mask_BS > 0 for batch in batches]),
            self.keep_fraction(progress.tokens),
            self._population(columns["token_id"]),
            progress,
        )
        return selection.split([batch.tokens_BS.shape[0] for batch in batches])

    def weight_ahead(self, batch: Batch, progress: TrainingProgress) -> Tensor:
        """The sum of the weights that `choose` will give this micro-batch (float64, 0-d).

        It is computed with losses of zero, so it must not depend on the losses
        (rules.knows_weight_ahead).
        """
        zeros_BS = torch.zeros(batch.tokens_BS.shape, device=batch.tokens_BS.device)
        unknown = dict.fromkeys(("loss", *self.extras), zeros_BS)
        return self.choose(batch, unknown, progress).weight_sum

    def describe(
        self,
        batch: Batch,
        outputs: Mapping[str, Tensor],
        selection: Selection,
        progress: TrainingProgress,
    ) -> MetricSums:
        """Sums and counts of a choice, for metrics."""
        columns = self._columns(batch, outputs)
        score_BS = None
        if self.scorer.uses_keep_fraction:
            # A scorer that weighs tokens against each other has no score of each alone.
            with contextlib.suppress(NotImplementedError):
                score_BS = self.scorer(columns, progress)
        return describe(
            columns,
            score_BS,
            batch.loss_mask_BS > 0,
            selection,
            sequence_length=self.sequence_length,
            corpora=self.corpora,
            loss_of_selected_only=self.rules.loss_of_selected_only,
        )

    def finish_step(self, progress: TrainingProgress) -> MetricSums:
        """Move a running threshold on; returns its measured deviation from the exact choice."""
        if self.running is None or not self.groups.is_last_stage:
            return {}
        return self.running.finish_step(self.keep_fraction(progress.tokens), self.groups.dp_cp)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        running = self.running.state_dict() if self.running else None
        return {"running": running, "ended_at_tokens": self.ended_at_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the running threshold; a run that newly uses one starts without a past."""
        if self.running is not None and state.get("running"):
            self.running.load_state_dict(state["running"])

    def _columns(self, batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            **batch.columns,
            **{name: value.detach() for name, value in outputs.items()},
            "token_id": batch.token_id_BS,
            "position": batch.position_ids_BS,
            "corpus_id": batch.corpus_id_B[:, None].expand_as(batch.token_id_BS),
        }

    def _population(self, token_id_BS: Tensor) -> Population:
        # All ranks hold micro-batches of the same shape, so no collective is needed to learn their
        # sizes.
        return Population(
            self.scope,
            token_id_BS,
            group=self.groups.dp_cp,
            cp_group=self.groups.cp,
            running=self.running,
            capacity=token_id_BS.numel(),
        )
