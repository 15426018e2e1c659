"""Which tokens compete with which.

B: sequences of this rank's micro-batch. S: tokens of a sequence on this rank (sequence length /
context parallel size).

The paper leaves the population open ("ranking the tokens in a batch"), and it matters: with
per-document loss offsets of 0.3 nats, choosing 60 % per sequence shares only 0.78 of its tokens
with the choice over everything. A choice over many documents also filters documents; a choice per
sequence cannot. `Population.top` lists what each scope promises and what it costs.

    population = Population("data_parallel", token_id_BS, group=dp_cp_group)
    selection = population.top(score_BS, eligible_BS, keep_fraction=0.6)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.populations import SCOPES
from megatron_slm.selection.running_threshold import RunningThreshold
from megatron_slm.selection.select import CountedMask, Selection, select_top
from megatron_slm.selection.sequence_top import top_of_sequences
from megatron_slm.selection.threshold import all_gather, other_ranks


@dataclass(frozen=True)
class Population:
    """The tokens that compete in one choice: a scope, their ids, and the groups that hold the rest.

    scope     one of SCOPES.
    token_id  int64 BS: (index of the sample in the global batch) * sequence length + position.
              Breaks ties.
    group     data x context parallel ranks of the last pipeline stage. Never the tensor group: its
              ranks hold the same tokens.
    cp_group  context parallel ranks: they hold the other pieces of the same sequences.
    running   the state of scope running_threshold, kept by the caller from step to step.
    capacity  the most tokens of any rank, when the caller knows it (select_top).
    """

    scope: str
    token_id: Tensor | None = None
    group: ProcessGroup | None = None
    cp_group: ProcessGroup | None = None
    running: RunningThreshold | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.scope == "global_batch" and self.token_id is None:
            raise ValueError(
                "scope global_batch needs token_id: the default, position in rank order, "
                "changes with the layout"
            )
        if self.scope == "running_threshold" and self.running is None:
            raise ValueError(
                "scope running_threshold needs its state: pass running=RunningThreshold() and "
                "keep it from step to step"
            )

    def top(self, score_BS: Tensor, eligible_BS: Tensor, keep_fraction: float) -> Selection:
        """The top keep_fraction (k) of the population by score.

        Every scope but running_threshold keeps exactly ceil(k * eligible) tokens of what competes:

        sequence            Each sequence by itself.
            promises        No dependence on micro-batch, data-parallel or context-parallel size. It
                            cannot tell a good document from a bad one.
            costs           One sort of the micro-batch's rows; with context parallelism one
                            all-gather of the scores among the ranks of a sequence.
        micro_batch         This data-parallel rank's micro-batch.
            promises        No dependence on the context-parallel size. Another micro-batch size or
                            data-parallel size changes which sequences meet, and so the choice.
            costs           One quickselect; no collective without context parallelism.
        data_parallel       The present micro-batch of all data x context parallel ranks: the widest
                            population that one pass can have.
            promises        The same threshold on every rank; no dependence on the context-parallel
                            size or on how sequences are dealt to ranks. Micro-batch i meets
                            micro-batch i only, because 1F1B runs its backward before the next
                            losses exist: another data-parallel size is another population.
            costs           A few small all-reduces per micro-batch, in the middle of the step: the
                            ranks wait for the slowest.
        global_batch        The optimizer step. B is every sequence of this rank's step: concatenate
                            the micro-batches, choose once, cut the result with Selection.split.
            promises        The same set under every data-parallel size, micro-batch size and
                            layout. (Another tensor layout rounds the losses differently: tokens
                            within float error of the threshold may swap.)
            costs           All scores before the first backward: a forward pass first (about +1/3
                            of the step), unless the score is static (stored columns only). Then a
                            few small all-reduces per step.
        running_threshold   Each token against the threshold of recent steps.
            promises        About the share k, without waiting for another rank. The first step,
                            which has no past, chooses exactly per micro-batch. The distance from
                            each step's exact set is measured (RunningThreshold.finish_step).
            costs           One comparison per token, and one exact threshold search at the end of
                            the step, where ranks meet anyway to add gradients.
        """
        if self.running is not None and self.scope == "running_threshold":
            return self.running.choose(score_BS, eligible_BS, keep_fraction, self.token_id)
        if self.scope == "sequence":
            return top_of_sequences(
                score_BS, eligible_BS, keep_fraction, self.token_id, self.cp_group
            )
        return select_top(
            score_BS,
            eligible_BS,
            keep_fraction,
            token_id=self.token_id,
            group=self.ranks,
            capacity=self.capacity,
        )

    @property
    def ranks(self) -> ProcessGroup | None:
        """The group whose tokens form one population; None when no other rank takes part."""
        if self.scope == "running_threshold":
            return None
        over_data_parallel = self.scope in ("data_parallel", "global_batch")
        return other_ranks(self.group if over_data_parallel else self.cp_group)

    def moments(self, value_BS: Tensor, known_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (fp32) of the known values of each token's population.

        Both broadcast against BS: per row under scope sequence, else one number. A population
        without values has mean 0; the deviation is never below 1e-12. Added in fp64 in rank order:
        identical bits on every rank; another layout may change the last fp64 bit before the
        rounding to fp32.
        """
        value = torch.where(known_BS, value_BS.double(), 0.0)
        dim = (1,) if self.scope == "sequence" else tuple(range(value.dim()))
        sums = torch.stack([known_BS.double().sum(dim, True), value.sum(dim, True)])
        count, total = add_over_ranks(sums, self.ranks)
        mean = total / count.clamp(min=1)
        squares = torch.where(known_BS, (value - mean).square(), 0.0).sum(dim, True)
        variance = add_over_ranks(squares, self.ranks) / count.clamp(min=1)
        return mean.float(), variance.sqrt().clamp(min=1e-12).float()

    def of_sequence(self, value_BS: Tensor) -> Tensor:
        """Sum over each whole sequence, fp64 (B, 1): also over the pieces that other context
        parallel ranks hold.
        """
        return add_over_ranks(value_BS.double().sum(1, keepdim=True), other_ranks(self.cp_group))

    def chosen(
        self, mask_BS: Tensor, eligible_BS: Tensor, weight_BS: Tensor | None = None
    ) -> Selection:
        """A Selection from a mask that no threshold made; counts what is kept and eligible over the
        population.
        """
        own = torch.stack([mask_BS.sum(), eligible_BS.bool().sum()])
        kept, eligible, here, _ = torch.cat([add_over_ranks(own, self.ranks), own]).tolist()
        counted = CountedMask(mask_BS, here)
        return Selection(mask_BS, math.nan, kept, eligible, weight=weight_BS, counted=counted)


def add_over_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over ranks, in rank order: bit-identical on all of them, which a floating point
    all-reduce does not promise.
    """
    if group is None:
        return value
    return torch.stack(all_gather(value, group)).sum(0)
