"""The head when the selection is known before it: kept rows only, forward and gradients in one pass over the logits.

Static scorers, stored masks and carried thresholds decide before the loss exists. Then 6k units of work per token are enough
(k = kept fraction, 6 = a head over all rows), against 2 + 4k when the losses of all rows must be seen first.

Legend: N tokens, K kept rows, C rows of a chunk, H hidden, V this tensor rank's true vocabulary columns, M rows of a
sequence-parallel shard. Everything with N, K or C is the same on all tensor ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.ops.head_backward import deliver_weight_gradient, reduce_rows
from megatron_slm.ops.head_call import HeadCall, check_inputs, chunks, logit_rows
from megatron_slm.ops.head_plan import Elementwise, plan_head
from megatron_slm.ops.matmul import (
    accumulate_weight_gradient,
    logits_into,
    operand,
    product_precision,
)
from megatron_slm.ops.row_passes import place_target, row_passes
from megatron_slm.ops.vocab_parallel import KeptRowLayout, VocabularyShard, combine_lse


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
) -> tuple[Tensor, Tensor]:
    """(loss * selected).sum() and loss, where loss is linear_cross_entropy(hidden, weight, target) of the selected rows only.

    selected   bool, or float weights (0 = not selected), target's shape, no gradient; the same on every tensor rank.
    returns    (loss_sum, loss): an fp32 scalar to differentiate, not divided by any count; and detached fp32 losses of target's
               shape, NaN where nothing was computed (not selected, or target is `ignore_index`).

    All other arguments and errors: as linear_cross_entropy. Gradients are computed in forward and held until backward, which
    scales them: the weight's takes V * H fp32 values meanwhile, and hidden's has hidden's dtype, so under fp16 a loss scale belongs into
    `selected` (and the sum is divided by it again): backward's would come too late for small values. One backward per forward. Collectives in forward: two fp32
    vectors per chunk of kept rows, and one reduction of the kept rows of d(hidden); all run when nothing is selected.
    """
    shard = VocabularyShard.of(weight.shape[0], tp_group, vocabulary_size)
    sharded_rows = sequence_parallel and shard.ranks > 1
    check_inputs(
        hidden,
        weight,
        target,
        shard,
        ignore_index=ignore_index,
        sharded_rows=sharded_rows,
        extras=(),
        accumulate_into_main_grad=accumulate_into_main_grad,
    )
    if selected.shape != target.shape:
        raise ValueError(
            f"selected is {tuple(selected.shape)} and target {tuple(target.shape)}; they must have the same shape."
        )
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
        shard, plan, ignore_index, float(z_loss), sharded_rows, accumulate_into_main_grad, ()
    )
    weight_N = (
        selected.detach().reshape(-1).float().masked_fill(target.reshape(-1) == ignore_index, 0.0)
    )
    needs = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    call = _SelectedLinearCrossEntropy.apply if needs else _without_graph
    loss_sum, loss_N = call(
        hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1), weight_N, head
    )
    return loss_sum, loss_N.view(target.shape)


def _without_graph(
    rows: Tensor, weight: Tensor, target_N: Tensor, weight_N: Tensor, head: HeadCall
) -> tuple[Tensor, Tensor]:
    return _KeptRowsPass(
        rows, weight, target_N, weight_N, head, needs_hidden=False, needs_weight=False
    ).run()


class _SelectedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows: Tensor, weight: Tensor, target_N: Tensor, weight_N: Tensor, head: HeadCall
    ):
        work = _KeptRowsPass(rows, weight, target_N, weight_N, head, *ctx.needs_input_grad[:2])
        loss_sum, loss_N = work.run()
        ctx.gradients = (work.gradient_rows, work.gradient_VH)
        ctx.parameter = weight if head.accumulate_into_main_grad else None
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(loss_N)
        return loss_sum, loss_N

    @staticmethod
    def backward(ctx, grad_sum: Tensor, _):
        if ctx.gradients is None:
            raise RuntimeError(
                "selected_linear_cross_entropy allows one backward per forward: it scales its gradients in place."
            )
        (gradient_rows, gradient_VH), ctx.gradients = ctx.gradients, None
        if gradient_rows is not None:
            gradient_rows.mul_(grad_sum)
        if gradient_VH is not None:
            gradient_VH.mul_(grad_sum)
            gradient_VH = deliver_weight_gradient(gradient_VH, ctx.parameter, ctx.dtype)
        return gradient_rows, gradient_VH, None, None, None


class _KeptRowsPass:
    """One pass over the kept rows: logits, loss, logit gradients, both products, chunk by chunk."""

    def __init__(
        self,
        rows,
        weight,
        target_N,
        weight_N,
        head: HeadCall,
        needs_hidden: bool,
        needs_weight: bool,
    ):
        self.head, self.weight, self.rows, self.tokens = head, weight, rows, len(target_N)
        self.index_K = weight_N.nonzero().squeeze(1)
        self.layout = (
            KeptRowLayout.of(self.index_K, len(rows), head.shard)
            if head.sequence_parallel
            else None
        )
        self.rows_KH = rows[self.index_K] if self.layout is None else self.layout.gather(rows)
        self.weight_K, self.target_K = weight_N[self.index_K], target_N[self.index_K]
        self.column_K, self.owned_K = head.shard.local_target(self.target_K)
        self.needs_hidden, self.needs_weight = needs_hidden, needs_weight
        self.gradient_rows: Tensor | None = None
        self.gradient_VH: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        """(loss_sum, loss_N); afterwards gradient_rows and gradient_VH hold d(loss_sum) where it is needed."""
        head, plan, columns, kept = (
            self.head,
            self.head.plan,
            self.head.shard.columns,
            len(self.index_K),
        )
        self.weight_VH = operand(self.weight[:columns], plan)
        self.logits_CV = logit_rows(self.rows, plan.chunk_tokens, columns, torch.float32)
        loss_K = torch.zeros(kept, dtype=torch.float32, device=self.rows.device)
        partial_KH = (
            self.rows.new_zeros((kept, self.weight.shape[1]), dtype=self.weight_VH.dtype)
            if self.needs_hidden
            else None
        )
        if self.needs_weight:
            self.gradient_VH = torch.zeros(
                self.weight.shape, dtype=torch.float32, device=self.weight.device
            )
        wants_gradient = self.needs_hidden or self.needs_weight
        grouped = wants_gradient and self.weight_VH.dtype != torch.float32
        group_GV = (
            logit_rows(
                self.rows, min(plan.gradient_chunk_tokens, kept), columns, self.weight_VH.dtype
            )
            if grouped
            else None
        )
        with product_precision(plan):
            for group in chunks(0, kept, plan.gradient_chunk_tokens):
                for chunk in chunks(group.start, group.stop, plan.chunk_tokens):
                    out_CV = (
                        group_GV[chunk.start - group.start : chunk.stop - group.start]
                        if grouped
                        else None
                    )
                    loss_K[chunk], gradient_CV = self._chunk(chunk, out_CV, wants_gradient)
                gradient_GV = group_GV[: group.stop - group.start] if grouped else gradient_CV
                if self.needs_hidden and columns:
                    torch.mm(gradient_GV, self.weight_VH, out=partial_KH[group])
                if self.needs_weight and columns:
                    accumulate_weight_gradient(
                        self.gradient_VH[:columns],
                        gradient_GV,
                        operand(self.rows_KH[group], plan),
                        fresh=group.start == 0,
                    )
        if not kept:
            head.shard.gather_fields(loss_K.new_zeros((2, 1)))
        self.logits_CV = None
        if self.needs_hidden:
            self.gradient_rows = reduce_rows(
                partial_KH, self.rows, head.shard, self.index_K, self.layout
            ).to(self.rows.dtype)
        loss_N = torch.full((self.tokens,), torch.nan, dtype=torch.float32, device=self.rows.device)
        loss_N[self.index_K] = loss_K
        return (loss_K * self.weight_K).sum(), loss_N

    def _chunk(
        self, chunk: slice, out_CV: Tensor | None, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """(loss_C, gradient of the logits in out_CV, or in the logits' own memory when out_CV is None)."""
        head, passes = self.head, row_passes(self.head.plan)
        logits_CV = self.logits_CV[: chunk.stop - chunk.start]
        fields_FC = torch.zeros((2, len(logits_CV)), dtype=torch.float32, device=logits_CV.device)
        fields_FC[0].fill_(-torch.inf)
        maximum_C = torch.full_like(fields_FC[0], -torch.inf)
        if head.shard.columns:
            logits_into(logits_CV, operand(self.rows_KH[chunk], head.plan), self.weight_VH)
            fields_FC[1] = (
                logits_CV.gather(1, self.column_K[chunk, None])
                .squeeze(1)
                .masked_fill(~self.owned_K[chunk], 0.0)
            )
            maximum_C, total_C = passes.softmax_statistics(logits_CV, logits_CV)
            fields_FC[0] = maximum_C + total_C.log()
        ranks = head.shard.gather_fields(fields_FC)
        lse_C = combine_lse([fields[0] for fields in ranks])
        target_logit_C = torch.stack([fields[1] for fields in ranks]).sum(0)
        outside_C = (self.target_K[chunk] < 0) | (
            self.target_K[chunk] >= head.shard.vocabulary_size
        )
        loss_C = (lse_C - target_logit_C + head.z_loss * lse_C.square()).masked_fill(
            outside_C, torch.nan
        )
        if not wants_gradient or not head.shard.columns:
            return loss_C, logits_CV
        weight_C, z_loss_factor_C = self.weight_K[chunk], 1.0 + 2.0 * head.z_loss * lse_C
        out_CV = logits_CV if out_CV is None else out_CV
        passes.gradient_from_kept(
            logits_CV,
            slice(0, len(logits_CV)),
            weight_C * z_loss_factor_C * (maximum_C - lse_C).exp(),
            out_CV,
        )
        place_target(
            out_CV,
            self.column_K[chunk],
            self.owned_K[chunk],
            weight_C * (z_loss_factor_C * (target_logit_C - lse_C).exp() - 1.0),
        )
        return loss_C, out_CV
