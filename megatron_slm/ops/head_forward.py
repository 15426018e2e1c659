"""The forward pass of the head: every token's loss, without keeping the logits.

Each tensor rank computes its own columns of the vocabulary chunk by chunk; then the ranks are
combined once.

Legend: N tokens, C rows of a chunk, H hidden, V this rank's true vocabulary columns, F fields (the
vectors that the ranks exchange), T tensor ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.ops.head_call import HeadCall, chunks, logit_rows, target_logits
from megatron_slm.ops.matmul import logits_into, operand, product_precision
from megatron_slm.ops.row_passes import entropy_and_square, row_passes
from megatron_slm.ops.vocab_parallel import VocabularyShard, combine_lse


@dataclass
class HeadForward:
    """What the forward pass returns, and what it saves for backward."""

    loss_N: Tensor
    extras: list[Tensor]
    """In the order of HeadCall.extras."""
    lse_N: Tensor
    target_logit_N: Tensor
    maximum_N: Tensor
    """Each row's largest logit on this rank."""
    kept_NV: Tensor | None
    """exp(logits - maximum_N), in keep mode."""
    widened_VH: Tensor | None
    """The fp32 copy of the weight, if it fits into the plan's memory budget."""


def head_forward(rows: Tensor, weight: Tensor, target_N: Tensor, head: HeadCall) -> HeadForward:
    shard = head.shard
    rows_NH = shard.gather_rows(rows) if head.sequence_parallel else rows
    columns = _RankColumns(rows_NH, weight, target_N, head)
    columns.compute()
    ranks = shard.gather_fields(columns.fields_FN)
    lse_TN = [fields_FN[0] for fields_FN in ranks]
    lse_N = combine_lse(lse_TN)
    target_logit_N = ranks[0][1]
    if len(ranks) > 1:
        target_logit_N = torch.stack([fields_FN[1] for fields_FN in ranks]).sum(0)
    loss_N = lse_N - target_logit_N
    if head.z_loss:
        loss_N = loss_N + head.z_loss * lse_N.square()
    ignored_N = target_N == head.ignore_index
    outside_N = (target_N < 0) | (target_N >= shard.vocabulary_size)
    loss_N = loss_N.masked_fill(~ignored_N & outside_N, torch.nan).masked_fill(ignored_N, 0.0)
    extras = []
    for field, name in enumerate(head.extras, start=2):
        values_N = _combine_extra(name, [fields_FN[field] for fields_FN in ranks], lse_TN, lse_N)
        if name == "target_rank":
            values_N = values_N.long().masked_fill(ignored_N, -1)
        extras.append(values_N)
    return HeadForward(
        loss_N,
        extras,
        lse_N,
        target_logit_N,
        columns.maximum_N,
        columns.kept_NV,
        columns.widened_VH,
    )


class _RankColumns:
    """This rank's columns: their log-sum-exp, the targets among them, and the extras."""

    def __init__(self, rows_NH: Tensor, weight: Tensor, target_N: Tensor, head: HeadCall):
        self.rows_NH = rows_NH
        self.weight = weight
        self.head = head
        self.column_N, self.owned_N = head.shard.local_target(target_N)
        fields = 2 + len(head.extras)
        self.fields_FN = torch.zeros(
            (fields, len(target_N)), dtype=torch.float32, device=rows_NH.device
        )
        """log-sum-exp, logit of the target, extras."""
        self.fields_FN[0].fill_(-torch.inf)
        self.maximum_N = torch.full_like(self.fields_FN[0], -torch.inf)
        self.kept_NV: Tensor | None = None
        if head.plan.mode == "keep":
            self.kept_NV = logit_rows(
                rows_NH, len(target_N), head.shard.columns, head.plan.kept_dtype
            )
        self.widened_VH: Tensor | None = None

    def compute(self) -> None:
        """Fill fields_FN, maximum_N and, in keep mode, kept_NV."""
        head = self.head
        weight_VH = operand(self.weight[: head.shard.columns], head.plan)
        is_copy = weight_VH.dtype != self.weight.dtype
        if self.kept_NV is not None and is_copy and weight_VH.nbytes <= head.plan.spare_bytes:
            # Copying it again in backward would cost 2 to 3 % of the head at 1024 tokens.
            self.widened_VH = weight_VH
        with product_precision(head.plan):
            every_target_N = None
            if "target_rank" in head.extras:
                every_target_N = _logit_of_every_target(
                    self.rows_NH, self.weight, self.column_N, self.owned_N, head.shard
                )
            if head.shard.columns:
                self._compute_chunks(weight_VH, every_target_N)

    def _compute_chunks(self, weight_VH: Tensor, every_target_N: Tensor | None) -> None:
        """`every_target_N`: what target_rank compares the logits with; None when target_rank is not
        requested.
        """
        plan = self.head.plan
        passes = row_passes(plan)
        kept_as_fp32 = self.kept_NV is not None and self.kept_NV.dtype == torch.float32
        scratch_rows = 0 if kept_as_fp32 else plan.chunk_tokens
        scratch_CV = logit_rows(self.rows_NH, scratch_rows, len(weight_VH), torch.float32)
        for chunk in chunks(0, len(self.rows_NH), plan.chunk_tokens):
            kept_CV = None if self.kept_NV is None else self.kept_NV[chunk]
            logits_CV = scratch_CV[: chunk.stop - chunk.start]
            if kept_CV is not None and kept_as_fp32:
                logits_CV = kept_CV
            logits_into(logits_CV, operand(self.rows_NH[chunk], plan), weight_VH)
            column_C, owned_C = self.column_N[chunk], self.owned_N[chunk]
            self.fields_FN[1, chunk] = target_logits(logits_CV, column_C, owned_C)
            for name, values_N in zip(self.head.extras, self.fields_FN[2:], strict=True):
                if name == "target_rank":
                    assert every_target_N is not None
                    values_N[chunk] = _columns_above(
                        every_target_N[chunk], logits_CV, column_C, owned_C
                    )
                else:
                    entropy_C, square_C = entropy_and_square(logits_CV)
                    values_N[chunk] = entropy_C if name == "entropy" else square_C
            self.maximum_N[chunk], total_C = passes.softmax_statistics(logits_CV, kept_CV)
            self.fields_FN[0, chunk] = self.maximum_N[chunk] + total_C.log()


def _logit_of_every_target(
    rows_NH: Tensor, weight: Tensor, column_N: Tensor, owned_N: Tensor, shard: VocabularyShard
) -> Tensor:
    """The targets' logits, known on every rank before the first chunk.

    A collective: ranks without columns take part too.
    """
    if shard.columns:
        logit_N = torch.linalg.vecdot(rows_NH.float(), weight[column_N].float())
        logit_N = logit_N.masked_fill(~owned_N, 0.0)
    else:
        logit_N = torch.zeros(len(rows_NH), dtype=torch.float32, device=rows_NH.device)
    return torch.cat(shard.gather_fields(logit_N[None])).sum(0)


def _columns_above(
    target_logit_C: Tensor, logits_CV: Tensor, column_C: Tensor, owned_C: Tensor
) -> Tensor:
    """How many columns of this rank have a higher logit than the target."""
    above_C = (logits_CV > target_logit_C[:, None]).sum(1)
    # Do not count the target itself: the two computations of its logit may differ by rounding.
    in_chunk_C = logits_CV.gather(1, column_C[:, None]).squeeze(1)
    return (above_C - (owned_C & (in_chunk_C > target_logit_C)).long()).float()


def _combine_extra(
    name: str, values_TN: Sequence[Tensor], lse_TN: Sequence[Tensor], lse_N: Tensor
) -> Tensor:
    """A quantity of the whole softmax from its values on each rank's columns."""
    total_N = torch.zeros_like(lse_N)
    for value_N, rank_lse_N in zip(values_TN, lse_TN, strict=True):
        rank_probability_N = (rank_lse_N - lse_N).exp()  # the probability of this rank's columns
        if name == "entropy":
            entropy_N = rank_probability_N * (value_N + lse_N - rank_lse_N)
            total_N += torch.where(rank_probability_N > 0, entropy_N, 0.0)
        elif name == "sum_squared_probability":
            total_N += rank_probability_N.square() * value_N
        else:
            total_N += value_N
    return total_N
