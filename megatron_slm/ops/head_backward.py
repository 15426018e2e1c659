"""Gradients of the head for the rows that have one.

With g the incoming gradient of a row, p its softmax and z the z-loss coefficient, the gradient of
its logits is
    g * ((1 + 2 z lse) * p - onehot(target)).
Rows with g = 0 are left out: no product, no pass over the vocabulary and no byte of a collective is
spent on them. Where the caller told which rows can have a gradient (known_rows.py), these are
computed.

Legend: N tokens, K rows to compute, C rows of a chunk, G rows of a group of chunks, H hidden,
V this rank's true vocabulary columns, M rows of a sequence-parallel shard.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.ops.head_call import HeadCall, chunks, logit_rows
from megatron_slm.ops.liger_engine import liger_gradients
from megatron_slm.ops.matmul import logits_into, operand, product_precision
from megatron_slm.ops.row_passes import gradient_from_kept, place_target, row_passes
from megatron_slm.ops.vocab_parallel import KeptRowLayout, VocabularyShard
from megatron_slm.ops.weight_gradient import (
    ParameterWithMainGrad,
    WeightGradient,
    deliver_weight_gradient,
)


@dataclass
class HeadBackwardInputs:
    """The inputs of one backward."""

    head: HeadCall
    rows: Tensor
    """[N, H], or this rank's [M, H] under sequence parallelism."""
    weight: Tensor
    target_N: Tensor
    upstream_N: Tensor
    """The gradient of the loss; 0 = the row is left out, or is of no effect where it was told."""
    lse_N: Tensor
    target_logit_N: Tensor
    maximum_N: Tensor
    kept_NV: Tensor | None
    """exp(logits - maximum_N) in keep mode; backward overwrites it."""
    widened_VH: Tensor | None
    """Forward's fp32 copy of the weight, where it was kept."""
    needs_hidden: bool
    needs_weight: bool
    parameter: ParameterWithMainGrad | None
    """The parameter whose main_grad takes the weight's gradient; None = return it."""


def head_gradients(inputs: HeadBackwardInputs) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of rows, gradient of weight), None where not needed."""
    head = inputs.head
    shard = inputs.head.shard
    index_K = head.rows_of(inputs.upstream_N)
    layout = None
    if head.sequence_parallel:
        layout = KeptRowLayout.of(index_K, len(inputs.rows), shard)
    kept = _KeptRows(inputs, index_K, layout)
    with product_precision(head.plan):
        partial_KH, total_VH = _gradients_of_kept_rows(inputs, kept)
    gradient_rows = gradient_weight = None
    if partial_KH is not None:
        whole = reduce_rows(partial_KH, inputs.rows, shard, index_K, layout)
        gradient_rows = whole.to(inputs.rows.dtype)
    if total_VH is not None:
        gradient_weight = deliver_weight_gradient(total_VH, inputs.parameter, inputs.weight.dtype)
    return gradient_rows, gradient_weight


class _KeptRows:
    """The K rows to compute, numbered 0 to K - 1."""

    def __init__(self, inputs: HeadBackwardInputs, index_K: Tensor, layout: KeptRowLayout | None):
        self.count = len(index_K)
        self.index: Tensor | slice = index_K
        """Where they are among the N rows."""
        if self.count == len(inputs.target_N):
            self.index = slice(None)
        self._rows = inputs.rows
        self._gathered_KH = None if layout is None else layout.gather(inputs.rows)

    def places(self, numbers: slice) -> Tensor | slice:
        """Indices among the N rows of the kept rows with these numbers."""
        return numbers if isinstance(self.index, slice) else self.index[numbers]

    def hidden(self, numbers: slice) -> Tensor:
        """Hidden states of the kept rows with these numbers."""
        if self._gathered_KH is not None:
            return self._gathered_KH[numbers]
        return self._rows[self.places(numbers)]


def _gradients_of_kept_rows(
    inputs: HeadBackwardInputs, kept: _KeptRows
) -> tuple[Tensor | None, Tensor | None]:
    """(this rank's partial gradient of the kept rows, fp32 gradient of its weight rows).

    The latter is main_grad itself when accumulating into it.
    """
    plan = inputs.head.plan
    columns = inputs.head.shard.columns
    weight_VH = inputs.widened_VH
    if weight_VH is None:
        weight_VH = operand(inputs.weight[:columns], plan)
    weight_gradient = partial_KH = None
    if inputs.needs_weight:
        weight_gradient = WeightGradient(inputs.weight, columns, inputs.parameter)
    if inputs.needs_hidden:
        size = (kept.count, inputs.weight.shape[1])
        partial_KH = inputs.rows.new_zeros(size, dtype=weight_VH.dtype)
    if kept.count and columns:
        if plan.engine == "liger":
            partial_KH = _by_liger(inputs, kept, weight_gradient)
        else:
            _by_chunks(inputs, kept, weight_VH, partial_KH, weight_gradient)
    return partial_KH, None if weight_gradient is None else weight_gradient.total()


def _by_chunks(
    inputs: HeadBackwardInputs,
    kept: _KeptRows,
    weight_VH: Tensor,
    partial_KH: Tensor | None,
    weight_gradient: WeightGradient | None,
) -> None:
    """Fill partial_KH and weight_gradient: logit gradients chunk by chunk, products by groups."""
    plan = inputs.head.plan
    logit_gradients = _LogitGradients(inputs, kept, weight_VH)
    for group in chunks(0, kept.count, plan.gradient_chunk_tokens):
        gradient_GV = logit_gradients.storage(group)
        rows_GH = kept.hidden(group)
        for chunk in chunks(group.start, group.stop, plan.chunk_tokens):
            inside = slice(chunk.start - group.start, chunk.stop - group.start)
            logit_gradients.fill(gradient_GV[inside], chunk, rows_GH[inside])
        if partial_KH is not None:
            torch.mm(gradient_GV, weight_VH, out=partial_KH[group])
        if weight_gradient is not None:
            weight_gradient.add(gradient_GV, operand(rows_GH, plan))


def _by_liger(
    inputs: HeadBackwardInputs, kept: _KeptRows, weight_gradient: WeightGradient | None
) -> Tensor | None:
    """The partial gradient of the kept rows, when it is needed; adds to weight_gradient."""
    shard = inputs.head.shard
    column_K, owned_K = shard.local_target(inputs.target_N[kept.index])
    partial_KH, product_VH = liger_gradients(
        kept.hidden(slice(0, kept.count)),
        inputs.weight[: shard.columns],
        column_K,
        owned_K,
        inputs.upstream_N[kept.index],
        inputs.lse_N[kept.index],
    )
    if weight_gradient is not None:
        weight_gradient.add_product(product_VH)
    return partial_KH if inputs.needs_hidden else None


class _LogitGradients:
    """Logit gradients of kept rows, from kept exponentials or from logits computed again."""

    def __init__(self, inputs: HeadBackwardInputs, kept: _KeptRows, weight_VH: Tensor):
        head = inputs.head
        plan = inputs.head.plan
        self.plan = plan
        self.weight_VH = weight_VH
        self.kept = kept
        self.kept_NV = inputs.kept_NV
        self.passes = row_passes(plan)
        upstream_K, self.lse_K = inputs.upstream_N[kept.index], inputs.lse_N[kept.index]
        z_loss_factor_K = 1.0 + 2.0 * head.z_loss * self.lse_K
        self.scale_K = upstream_K * z_loss_factor_K
        if self.kept_NV is not None:
            self.scale_K = self.scale_K * (inputs.maximum_N[kept.index] - self.lse_K).exp()
        # The target's entry is placed from fp32 vectors: p - 1 of a confident token would be lost
        # in the rounding of a kept p.
        target_probability_K = (inputs.target_logit_N[kept.index] - self.lse_K).exp()
        self.target_value_K = upstream_K * (z_loss_factor_K * target_probability_K - 1.0)
        self.column_K, self.owned_K = head.shard.local_target(inputs.target_N[kept.index])
        self._allocate(inputs.rows)

    def _allocate(self, like: Tensor) -> None:
        """Memory for the gradients of a group, and for logits where these need their own."""
        dtype = self.weight_VH.dtype
        columns = len(self.weight_VH)
        group_rows = min(self.plan.gradient_chunk_tokens, self.kept.count)
        self.logits_CV: Tensor | None = None
        if self.kept_NV is not None and self.kept_NV.dtype == dtype:
            self.in_place = True
            self.storage_GV = self.kept_NV
            return
        self.in_place = False
        self.storage_GV = logit_rows(like, group_rows, columns, dtype)
        if self.kept_NV is None and dtype != torch.float32:
            chunk_rows = min(self.plan.chunk_tokens, group_rows)
            self.logits_CV = logit_rows(like, chunk_rows, columns, torch.float32)

    def storage(self, group: slice) -> Tensor:
        """Where the rows of a group are written.

        The front of the kept rows when these have the right dtype, else scratch memory.
        """
        if self.in_place:
            return self.storage_GV[group]
        return self.storage_GV[: group.stop - group.start]

    def fill(self, out_CV: Tensor, chunk: slice, rows_CH: Tensor) -> None:
        """Fill out_CV for the kept rows numbered `chunk`, whose hidden states are rows_CH."""
        if self.kept_NV is not None:
            places = self.kept.places(chunk)
            gradient_from_kept(self.kept_NV, places, self.scale_K[chunk], out_CV)
        else:
            logits_CV = out_CV if self.logits_CV is None else self.logits_CV[: len(out_CV)]
            logits_into(logits_CV, operand(rows_CH, self.plan), self.weight_VH)
            self.passes.gradient_from_logits(
                logits_CV, self.lse_K[chunk], self.scale_K[chunk], out_CV
            )
        place_target(out_CV, self.column_K[chunk], self.owned_K[chunk], self.target_value_K[chunk])


def reduce_rows(
    partial_KH: Tensor,
    rows: Tensor,
    shard: VocabularyShard,
    index_K: Tensor,
    layout: KeptRowLayout | None,
) -> Tensor:
    """Sum the tensor ranks' parts of the kept rows and put them at their places among `rows`.

    The other rows are zero.
    """
    if layout is not None:
        return layout.reduce_scatter(partial_KH, len(rows))
    if shard.group is not None:
        # At least one row: some backends skip a collective of no elements, and no rank may skip it.
        sent = partial_KH if len(partial_KH) else partial_KH.new_zeros((1, partial_KH.shape[1]))
        dist.all_reduce(sent, group=shard.group)
    if len(index_K) == len(rows):
        return partial_KH
    rows_NH = rows.new_zeros(rows.shape)
    rows_NH[index_K] = partial_KH.to(rows.dtype)
    return rows_NH
