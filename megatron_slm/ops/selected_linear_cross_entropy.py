"""The head when the selection is known before it: the selected rows only.

Static scorers, stored masks and carried thresholds decide before the loss exists. Loss and
gradients then come from one pass over the logits of the selected rows: 6k units of work per token
(k = kept fraction, 6 = a head over all rows), against 2 + 4k when the losses of all rows must be
seen first.

Gradients are computed in forward and held until backward, which scales them. The weight's takes
V * H fp32 values meanwhile. Hidden's has hidden's dtype, so under fp16 a loss scale belongs into
`selected` (and the sum is divided by it again): in backward it would be applied too late, after
small values have underflowed. Collectives in forward: two fp32 vectors per chunk of selected rows,
and one reduction of the selected rows of d(hidden); all of them run when nothing is selected.

Legend: N tokens, K selected rows, C rows of a chunk, G rows of a group of chunks, H hidden, V this
tensor rank's true vocabulary columns, F fields. Everything with N, K or C is the same on all tensor
ranks.
"""

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_slm.ops.head_backward import reduce_rows
from megatron_slm.ops.head_call import HeadCall, chunks, logit_rows, target_logits
from megatron_slm.ops.head_plan import Elementwise, plan_head
from megatron_slm.ops.known_rows import KnownRows
from megatron_slm.ops.matmul import logits_into, operand, product_precision
from megatron_slm.ops.row_passes import gradient_from_kept, place_target, row_passes
from megatron_slm.ops.vocab_parallel import KeptRowLayout, VocabularyShard, combine_lse
from megatron_slm.ops.weight_gradient import (
    ParameterWithMainGrad,
    WeightGradient,
    deliver_weight_gradient,
)


def selected_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    selected: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocabulary_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    accumulate_into_main_grad: bool = False,
    chunk_tokens: int | None = None,
    elementwise: Elementwise = "auto",
    known_rows: KnownRows | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss * selected).sum() and loss, the latter as linear_cross_entropy of the selected rows.

    selected   bool, or float weights (0 = not selected), of target's shape, without gradient; the
               same on every tensor rank.
    known_rows was told the selected rows and their number, so that forward on a GPU does not wait
               for that. A row of weight 0 among them is computed too, and gets its loss.
    returns    (loss_sum, loss): an fp32 scalar to differentiate, not divided by any count; and
               detached fp32 losses of target's shape, NaN where nothing was computed (not selected,
               or target is `ignore_index`).

    All other arguments and errors are those of linear_cross_entropy. One backward per forward.
    """
    shard = VocabularyShard.of(weight.shape[0], tp_group, vocabulary_size)
    sharded = sequence_parallel and shard.ranks > 1
    plan = plan_head(
        target.numel(),
        shard.columns,
        hidden.dtype,
        hidden.device,
        mode="recompute",
        chunk_tokens=chunk_tokens,
        elementwise=elementwise,
    )
    head = HeadCall(
        shard, plan, ignore_index, z_loss, sharded, accumulate_into_main_grad, (), known_rows
    )
    head.check(hidden, weight, target)
    if selected.shape != target.shape:
        raise ValueError(
            f"selected is {tuple(selected.shape)} and target {tuple(target.shape)}; "
            "they must have the same shape."
        )
    rows, target_N = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    weight_N = selected.detach().reshape(-1).float().masked_fill(target_N == ignore_index, 0.0)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss_sum, loss_N = _SelectedLinearCrossEntropy.apply(rows, weight, target_N, weight_N, head)
    else:
        loss_sum, loss_N = _SelectedRows(rows, weight, target_N, weight_N, head).losses()
    return loss_sum, loss_N.view(target.shape)


class _Context(FunctionCtx):
    """What forward saves for backward."""

    gradients: tuple[Tensor | None, Tensor | None] | None
    """d(loss_sum) by rows and by weight; None once backward has scaled them in place."""
    parameter: ParameterWithMainGrad | None
    """None where autograd takes the weight's gradient."""
    dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]


class _SelectedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        rows: Tensor,
        weight: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        head: HeadCall,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        selected_rows = _SelectedRows(rows, weight, target_N, weight_N, head)
        loss_sum, loss_N = selected_rows.losses(needs_hidden, needs_weight)
        ctx.gradients = (selected_rows.gradient_rows, selected_rows.gradient_weight)
        ctx.parameter = None
        if head.accumulate_into_main_grad:
            ctx.parameter = cast(ParameterWithMainGrad, weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(loss_N)
        return loss_sum, loss_N

    @staticmethod
    def backward(ctx: _Context, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "selected_linear_cross_entropy allows one backward per forward: "
                "it scales its gradients in place."
            )
        (gradient_rows, gradient_VH), ctx.gradients = ctx.gradients, None
        if gradient_rows is not None:
            gradient_rows.mul_(grad_sum)
        if gradient_VH is not None:
            gradient_VH.mul_(grad_sum)
            gradient_VH = deliver_weight_gradient(gradient_VH, ctx.parameter, ctx.dtype)
        return gradient_rows, gradient_VH, None, None, None


class _Statistics(NamedTuple):
    """The softmax of a chunk of rows, over all tensor ranks."""

    loss_C: Tensor
    lse_C: Tensor
    target_logit_C: Tensor
    maximum_C: Tensor
    """Each row's largest logit on this rank."""


class _SelectedRows:
    """One pass over the selected rows: logits, loss, logit gradients, both products, by chunks."""

    def __init__(
        self, rows: Tensor, weight: Tensor, target_N: Tensor, weight_N: Tensor, head: HeadCall
    ):
        self.head = head
        self.weight = weight
        self.rows = rows
        self.tokens = len(target_N)
        self.index_K = head.rows_of(weight_N)
        self.layout: KeptRowLayout | None = None
        if head.sequence_parallel:
            self.layout = KeptRowLayout.of(self.index_K, len(rows), head.shard)
            self.rows_KH = self.layout.gather(rows)
        else:
            self.rows_KH = rows[self.index_K]
        self.weight_K = weight_N[self.index_K]
        self.target_K = target_N[self.index_K]
        self.column_K, self.owned_K = head.shard.local_target(self.target_K)
        self.weight_VH = operand(weight[: head.shard.columns], head.plan)
        self.passes = row_passes(head.plan)
        self.gradient_rows: Tensor | None = None
        self.gradient_weight: Tensor | None = None

    def losses(
        self, needs_hidden: bool = False, needs_weight: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(loss_sum, loss_N); gradient_rows and gradient_weight are set where they are needed."""
        shard = self.head.shard
        kept = len(self.index_K)
        partial_KH = weight_gradient = None
        if needs_hidden:
            size = (kept, self.weight.shape[1])
            partial_KH = self.rows.new_zeros(size, dtype=self.weight_VH.dtype)
        if needs_weight:
            weight_gradient = WeightGradient(self.weight, shard.columns, None)
        with product_precision(self.head.plan):
            loss_K = self._by_chunks(partial_KH, weight_gradient)
        if not kept:  # no chunk, but the other ranks' collective needs this rank
            shard.gather_fields(loss_K.new_zeros((2, 1)))
        if partial_KH is not None:
            whole = reduce_rows(partial_KH, self.rows, shard, self.index_K, self.layout)
            self.gradient_rows = whole.to(self.rows.dtype)
        if weight_gradient is not None:
            self.gradient_weight = weight_gradient.total()
        loss_N = torch.full((self.tokens,), torch.nan, dtype=torch.float32, device=self.rows.device)
        loss_N[self.index_K] = loss_K
        # where: the loss of an ignored target is NaN, and its weight 0 times that would be NaN too.
        return torch.where(self.weight_K != 0, loss_K * self.weight_K, 0.0).sum(), loss_N

    def _by_chunks(
        self, partial_KH: Tensor | None, weight_gradient: WeightGradient | None
    ) -> Tensor:
        """The losses of the selected rows; fills partial_KH and weight_gradient."""
        plan = self.head.plan
        columns = self.head.shard.columns
        kept = len(self.index_K)
        loss_K = torch.zeros(kept, dtype=torch.float32, device=self.rows.device)
        logits_CV = logit_rows(self.rows, plan.chunk_tokens, columns, torch.float32)
        needs_gradient = columns > 0 and (partial_KH is not None or weight_gradient is not None)
        gradient_GV = logits_CV  # fp32 gradients take the memory of the logits: one chunk per group
        if needs_gradient and self.weight_VH.dtype != torch.float32:
            group_rows = min(plan.gradient_chunk_tokens, kept)
            gradient_GV = logit_rows(self.rows, group_rows, columns, self.weight_VH.dtype)
        for group in chunks(0, kept, plan.gradient_chunk_tokens):
            for chunk in chunks(group.start, group.stop, plan.chunk_tokens):
                statistics = self._statistics(chunk, logits_CV[: chunk.stop - chunk.start])
                loss_K[chunk] = statistics.loss_C
                if needs_gradient:
                    inside = slice(chunk.start - group.start, chunk.stop - group.start)
                    self._logit_gradient(chunk, statistics, logits_CV, gradient_GV[inside])
            written_GV = gradient_GV[: group.stop - group.start]
            if needs_gradient and partial_KH is not None:
                torch.mm(written_GV, self.weight_VH, out=partial_KH[group])
            if needs_gradient and weight_gradient is not None:
                weight_gradient.add(written_GV, operand(self.rows_KH[group], plan))
        return loss_K

    def _statistics(self, chunk: slice, logits_CV: Tensor) -> _Statistics:
        """Of the rows numbered `chunk`; leaves exp(logits - maximum) in logits_CV."""
        shard = self.head.shard
        fields_FC = torch.zeros((2, len(logits_CV)), dtype=torch.float32, device=logits_CV.device)
        fields_FC[0].fill_(-torch.inf)
        maximum_C = torch.full_like(fields_FC[0], -torch.inf)
        if shard.columns:
            logits_into(logits_CV, operand(self.rows_KH[chunk], self.head.plan), self.weight_VH)
            fields_FC[1] = target_logits(logits_CV, self.column_K[chunk], self.owned_K[chunk])
            maximum_C, total_C = self.passes.softmax_statistics(logits_CV, logits_CV)
            fields_FC[0] = maximum_C + total_C.log()
        ranks = shard.gather_fields(fields_FC)
        lse_C = combine_lse([fields[0] for fields in ranks])
        target_logit_C = torch.stack([fields[1] for fields in ranks]).sum(0)
        target_C = self.target_K[chunk]
        outside_C = (target_C < 0) | (target_C >= shard.vocabulary_size)
        loss_C = lse_C - target_logit_C + self.head.z_loss * lse_C.square()
        loss_C = loss_C.masked_fill(outside_C, torch.nan)
        return _Statistics(loss_C, lse_C, target_logit_C, maximum_C)

    def _logit_gradient(
        self, chunk: slice, statistics: _Statistics, exponentials_CV: Tensor, out_CV: Tensor
    ) -> None:
        """Fill out_CV, which may be the memory of the exponentials."""
        weight_C = self.weight_K[chunk]
        lse_C = statistics.lse_C
        z_loss_factor_C = 1.0 + 2.0 * self.head.z_loss * lse_C
        scale_C = weight_C * z_loss_factor_C * (statistics.maximum_C - lse_C).exp()
        gradient_from_kept(exponentials_CV, slice(0, len(out_CV)), scale_C, out_CV)
        target_probability_C = (statistics.target_logit_C - lse_C).exp()
        target_value_C = weight_C * (z_loss_factor_C * target_probability_C - 1.0)
        place_target(out_CV, self.column_K[chunk], self.owned_K[chunk], target_value_C)
