"""Gradients of the head for the rows that have one.

With g the incoming gradient of a row, p its softmax and z the z-loss coefficient, the gradient of its logits is
    g * ((1 + 2 z lse) * p - onehot(target)).
Rows with g = 0 never enter: no product, no pass over the vocabulary, no byte of a collective is spent on them.

Legend: N tokens, K rows with a gradient, C rows of a chunk, H hidden, V this rank's true columns, M rows of a sequence-parallel shard.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.ops.head_call import HeadCall, chunks, logit_rows
from megatron_slm.ops.liger_engine import liger_gradients
from megatron_slm.ops.matmul import (
    accumulate_weight_gradient,
    logits_into,
    operand,
    product_precision,
)
from megatron_slm.ops.row_passes import place_target, row_passes
from megatron_slm.ops.vocab_parallel import KeptRowLayout, VocabularyShard


@dataclass
class HeadBackwardInputs:
    """The inputs of one backward."""

    head: HeadCall
    rows: Tensor
    weight: Tensor
    target_N: Tensor
    upstream_N: Tensor
    lse_N: Tensor
    target_logit_N: Tensor
    maximum_N: Tensor
    kept_NV: Tensor | None
    widened_VH: Tensor | None
    """Forward's fp32 copy of the weight, where it was kept."""
    needs_hidden: bool
    needs_weight: bool
    parameter: Tensor | None
    """The parameter whose main_grad takes the weight's gradient; None = return it."""


def head_gradients(inputs: HeadBackwardInputs) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of rows, gradient of weight), None where not needed."""
    head, shard = inputs.head, inputs.head.shard
    tokens = len(inputs.target_N)
    index_K = inputs.upstream_N.nonzero().squeeze(1)
    layout = KeptRowLayout.of(index_K, len(inputs.rows), shard) if head.sequence_parallel else None
    every_row = len(index_K) == tokens
    gathered_KH = layout.gather(inputs.rows) if layout is not None else None
    with product_precision(head.plan):
        partial_KH, gradient_VH = _gradients_of_kept_rows(
            inputs, gathered_KH, None if every_row else index_K, len(index_K)
        )
    gradient_rows = None
    if inputs.needs_hidden:
        gradient_rows = reduce_rows(partial_KH, inputs.rows, shard, index_K, layout).to(
            inputs.rows.dtype
        )
    return gradient_rows, deliver_weight_gradient(
        gradient_VH, inputs.parameter, inputs.weight.dtype
    ) if inputs.needs_weight else None


def _gradients_of_kept_rows(
    inputs: HeadBackwardInputs, gathered_KH: Tensor | None, index_K: Tensor | None, kept: int
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's (partial gradient of the kept rows, fp32 gradient of its weight rows: main_grad itself when accumulating)."""
    plan, columns = inputs.head.plan, inputs.head.shard.columns
    weight_VH = (
        inputs.widened_VH
        if inputs.widened_VH is not None
        else operand(inputs.weight[:columns], plan)
    )
    partial_KH = (
        inputs.rows.new_zeros((kept, inputs.weight.shape[1]), dtype=weight_VH.dtype)
        if inputs.needs_hidden
        else None
    )
    total_VH, fresh = _weight_gradient_buffer(inputs)
    if not kept or not columns:
        return partial_KH, total_VH.zero_() if fresh and total_VH is not None else total_VH
    if plan.engine == "liger":
        return _by_liger(
            inputs, gathered_KH, slice(None) if index_K is None else index_K, total_VH, fresh
        )
    fill = _GradientRows(inputs, index_K, weight_VH)
    for group in chunks(0, kept, plan.gradient_chunk_tokens):
        gradient_GV = fill.storage(group)
        rows_GH = (
            gathered_KH[group]
            if gathered_KH is not None
            else inputs.rows[group if index_K is None else index_K[group]]
        )
        for chunk in chunks(group.start, group.stop, plan.chunk_tokens):
            inside = slice(chunk.start - group.start, chunk.stop - group.start)
            fill.into(gradient_GV[inside], chunk, rows_GH[inside])
        if partial_KH is not None:
            torch.mm(gradient_GV, weight_VH, out=partial_KH[group])
        if total_VH is not None:
            accumulate_weight_gradient(
                total_VH[:columns], gradient_GV, operand(rows_GH, plan), fresh=fresh
            )
            if fresh:
                total_VH[columns:].zero_()
                fresh = False
    return partial_KH, total_VH


def _by_liger(
    inputs: HeadBackwardInputs,
    gathered_KH: Tensor | None,
    index_K: Tensor | slice,
    total_VH: Tensor | None,
    fresh: bool,
) -> tuple[Tensor, Tensor | None]:
    shard = inputs.head.shard
    rows_KH = gathered_KH if gathered_KH is not None else inputs.rows[index_K]
    column_K, owned_K = shard.local_target(inputs.target_N[index_K])
    weight_VH = inputs.weight[: shard.columns]
    partial_KH, gradient_VH = liger_gradients(
        rows_KH, weight_VH, column_K, owned_K, inputs.upstream_N[index_K], inputs.lse_N[index_K]
    )
    if total_VH is not None and fresh:
        total_VH[: shard.columns], total_VH[shard.columns :] = gradient_VH, 0.0
    elif total_VH is not None:
        total_VH[: shard.columns].add_(gradient_VH)
    return partial_KH, total_VH


class _GradientRows:
    """Writes the logit gradients of a chunk of kept rows, from kept exponentials or by computing the logits again."""

    def __init__(self, inputs: HeadBackwardInputs, index_K: Tensor | None, weight_VH: Tensor):
        head, plan = inputs.head, inputs.head.plan
        every = slice(None) if index_K is None else index_K
        self.plan, self.weight_VH, self.index_K = plan, weight_VH, index_K
        self.kept_NV, self.passes = inputs.kept_NV, row_passes(plan)
        upstream_K, self.lse_K = inputs.upstream_N[every], inputs.lse_N[every]
        z_loss_factor_K = 1.0 + 2.0 * head.z_loss * self.lse_K
        self.scale_K = upstream_K * z_loss_factor_K
        if self.kept_NV is not None:
            self.scale_K = self.scale_K * (inputs.maximum_N[every] - self.lse_K).exp()
        # The target's entry is placed from fp32 vectors: p - 1 of a confident token would drown in the rounding of a kept p.
        self.target_value_K = upstream_K * (
            z_loss_factor_K * (inputs.target_logit_N[every] - self.lse_K).exp() - 1.0
        )
        self.column_K, self.owned_K = head.shard.local_target(inputs.target_N[every])
        self.in_place = self.kept_NV is not None and self.kept_NV.dtype == weight_VH.dtype
        rows = min(plan.gradient_chunk_tokens, len(self.scale_K))
        self.group_GV = (
            None
            if self.in_place
            else logit_rows(inputs.rows, rows, len(weight_VH), weight_VH.dtype)
        )
        needs_logits = self.kept_NV is None and weight_VH.dtype != torch.float32
        self.logits_CV = (
            logit_rows(inputs.rows, min(plan.chunk_tokens, rows), len(weight_VH), torch.float32)
            if needs_logits
            else None
        )

    def storage(self, group: slice) -> Tensor:
        """Where the rows of a group are written: the front of the kept rows when they have the right dtype, else scratch."""
        return self.kept_NV[group] if self.in_place else self.group_GV[: group.stop - group.start]

    def into(self, out_CV: Tensor, chunk: slice, rows_CH: Tensor) -> None:
        """Fill out_CV for the kept rows numbered `chunk`, whose hidden states are rows_CH."""
        if self.kept_NV is not None:
            index = chunk if self.index_K is None else self.index_K[chunk]
            self.passes.gradient_from_kept(self.kept_NV, index, self.scale_K[chunk], out_CV)
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
    """Sum the tensor ranks' parts of the kept rows and put them at their places among `rows`; the others are zero."""
    if layout is not None:
        return layout.reduce_scatter(partial_KH, len(rows))
    if shard.group is not None:
        # One row at least: no rank may leave a collective out, and some backends do when there is nothing to send.
        sent = partial_KH if len(partial_KH) else partial_KH.new_zeros((1, partial_KH.shape[1]))
        dist.all_reduce(sent, group=shard.group)
    if len(index_K) == len(rows):
        return partial_KH
    rows_NH = rows.new_zeros(rows.shape)
    rows_NH[index_K] = partial_KH.to(rows.dtype)
    return rows_NH


def _weight_gradient_buffer(inputs: HeadBackwardInputs) -> tuple[Tensor | None, bool]:
    """(fp32 buffer over all weight rows, whether it holds nothing yet)."""
    if not inputs.needs_weight:
        return None, False
    if inputs.parameter is not None and inputs.parameter.main_grad.dtype == torch.float32:
        return inputs.parameter.main_grad, False
    return torch.empty(inputs.weight.shape, dtype=torch.float32, device=inputs.weight.device), True


def deliver_weight_gradient(
    gradient_VH: Tensor, parameter: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The gradient autograd gets. With `parameter`: into its main_grad, by megatron-core's protocol (tensor_parallel/layers.py, 0.16.1)."""
    if parameter is None:
        return gradient_VH.to(dtype)
    if gradient_VH is not parameter.main_grad:
        parameter.main_grad.add_(gradient_VH)
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    # A tied embedding adds its own gradient to this placeholder, and megatron-core then adds the sum: it must be zeros.
    return (
        torch.zeros_like(parameter)
        if getattr(parameter, "zero_out_wgrad", False)
        else torch.empty_like(parameter)
    )
