"""Loss of a linear head, token by token, whose backward computes the rows with a gradient only.

    loss = linear_cross_entropy(hidden, weight, target)     # fp32, one per token
    selected = choose(loss.detach())                        # any rule
    (loss * selected).sum().backward()                      # rows outside `selected` cost nothing

Mask or weight the loss: a row whose incoming gradient is zero is left out of every product.
Under no_grad nothing is kept and no graph is made; for the same plan the loss is the same, bit for
bit. Losses come from fp32 sums of exact products, also in bf16, and the weight's gradient is
accumulated in fp32.

Cost per token in units of 2 H V operations, with k the fraction of rows that have a gradient:
forward 1; backward 3k (recompute) or 2k (keep). A head that materialises logits costs 1 and 2.
docs/head.md has the picture and the measurements.

Tensor parallelism: forward does one all-gather of two fp32 vectors, backward one all-reduce of the
kept rows of d(hidden). Every rank of the group must call both, with the same incoming gradient; the
collectives run also when no row is kept. With sequence parallelism rows are gathered in forward and
reduce-scattered in backward instead.

Legend: N tokens (flattened), H hidden, V this tensor rank's true vocabulary columns, T tensor
ranks, S positions, B sequences. Everything with N is the same on all tensor ranks.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_slm.ops.head_backward import HeadBackwardInputs, head_gradients
from megatron_slm.ops.head_call import HeadCall
from megatron_slm.ops.head_forward import head_forward
from megatron_slm.ops.head_plan import KEPT_BUDGET_BYTES, Elementwise, Engine, Mode, plan_head
from megatron_slm.ops.known_rows import KnownRows
from megatron_slm.ops.vocab_parallel import VocabularyShard
from megatron_slm.ops.weight_gradient import ParameterWithMainGrad


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocabulary_size: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    extras: tuple[str, ...] = (),
    accumulate_into_main_grad: bool = False,
    mode: Mode = "auto",
    kept_budget_bytes: int = KEPT_BUDGET_BYTES,
    chunk_tokens: int | None = None,
    elementwise: Elementwise = "auto",
    engine: Engine = "torch",
    known_rows: KnownRows | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """F.cross_entropy((hidden @ weight.T).float()[..., :vocabulary_size], target) of each token.

    hidden [..., H] in fp32, bf16 or fp16, and weight [V, H] in the same dtype; target int64, of
    hidden's shape without H (for Megatron's [S, B, H]: labels.transpose(0, 1)). Returns the loss
    in nats, of target's shape: 0 where target is ignore_index, the same bits on all tensor ranks.

    tp_group            ranks that share the vocabulary; weight is this rank's rows of it
    sequence_parallel   hidden is this rank's [S/T, B, H]; target and loss are the whole [S, B]
    vocabulary_size     true size; weight rows beyond it are padding: logits -inf, no gradient
    z_loss              adds z_loss * logsumexp(logits)**2 to the loss (PaLM, arXiv 2204.02311)
    extras              names of head_call.EXTRAS; then (loss, {name: detached values}) is returned
    accumulate_into_main_grad   adds the weight's gradient in fp32 to weight.main_grad, and returns
                        a placeholder, as megatron-core's gradient-accumulation fusion does
    mode, kept_budget_bytes, chunk_tokens, elementwise   how it is computed: see plan_head. keep
                        allows one backward per forward: it works in the memory that was kept
    engine              "liger": backward by Liger-Kernel's Hopper kernel (liger_engine.py says what
                        it needs and how exact it is); losses are the same; never used unasked
    known_rows          told before backward, it spares backward a wait for the GPU (known_rows.py)

    ValueError: shapes, dtypes or options that do not fit, or a target outside the vocabulary. (On a
    GPU, where looking at ids would stall the stream, such a token's loss is NaN.)
    """
    shard = VocabularyShard.of(weight.shape[0], tp_group, vocabulary_size)
    sharded = sequence_parallel and shard.ranks > 1
    plan = plan_head(
        target.numel(),
        shard.columns,
        hidden.dtype,
        hidden.device,
        mode=mode,
        kept_budget_bytes=kept_budget_bytes,
        chunk_tokens=chunk_tokens,
        elementwise=elementwise,
        engine=engine,
        will_backward=_will_backward(hidden, weight),
    )
    head = HeadCall(
        shard, plan, ignore_index, z_loss, sharded, accumulate_into_main_grad, extras, known_rows
    )
    head.check(hidden, weight, target)
    return _losses(hidden, weight, target, head)


def _will_backward(hidden: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


def _losses(
    hidden: Tensor, weight: Tensor, target: Tensor, head: HeadCall
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The losses in target's shape, and with extras these too."""
    rows, target_N = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if _will_backward(hidden, weight):
        loss_N, *extras = _LinearCrossEntropy.apply(rows, weight, target_N, head)
    else:
        result = head_forward(rows, weight, target_N, head)
        loss_N = result.loss_N
        extras = result.extras
    loss = loss_N.view(target.shape)
    if not head.extras:
        return loss
    return loss, {
        name: values_N.view(target.shape)
        for name, values_N in zip(head.extras, extras, strict=True)
    }


class _Context(FunctionCtx):
    """What forward saves for backward."""

    head: HeadCall
    kept_NV: Tensor | None
    """Not among the saved tensors: backward overwrites this memory, so it removes the reference,
    and a second backward fails. The same holds for widened_VH."""
    widened_VH: Tensor | None
    parameter: ParameterWithMainGrad | None
    """None where autograd takes the weight's gradient. megatron-core keeps its accumulation buffer
    and its flag on the parameter object itself."""
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, rows: Tensor, weight: Tensor, target_N: Tensor, head: HeadCall
    ) -> tuple[Tensor, ...]:
        result = head_forward(rows, weight, target_N, head)
        ctx.head = head
        ctx.save_for_backward(
            rows, weight, target_N, result.lse_N, result.target_logit_N, result.maximum_N
        )
        ctx.kept_NV, ctx.widened_VH = result.kept_NV, result.widened_VH
        ctx.parameter = None
        if head.accumulate_into_main_grad:
            ctx.parameter = cast(ParameterWithMainGrad, weight)
        ctx.mark_non_differentiable(*result.extras)
        return result.loss_N, *result.extras

    @staticmethod
    def backward(ctx: _Context, grad_loss_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        kept_NV, widened_VH = ctx.kept_NV, ctx.widened_VH
        ctx.kept_NV = ctx.widened_VH = None
        if ctx.head.plan.mode == "keep" and kept_NV is None:
            raise RuntimeError(
                "linear_cross_entropy(mode='keep') allows one backward per forward; "
                "use mode='recompute' with retain_graph."
            )
        rows, weight, target_N, lse_N, target_logit_N, maximum_N = ctx.saved_tensors
        ignored_N = target_N == ctx.head.ignore_index
        inputs = HeadBackwardInputs(
            head=ctx.head,
            rows=rows,
            weight=weight,
            target_N=target_N,
            upstream_N=torch.where(ignored_N, 0.0, grad_loss_N.float()),
            lse_N=lse_N,
            target_logit_N=target_logit_N,
            maximum_N=maximum_N,
            kept_NV=kept_NV,
            widened_VH=widened_VH,
            needs_hidden=ctx.needs_input_grad[0],
            needs_weight=ctx.needs_input_grad[1],
            parameter=ctx.parameter,
        )
        return *head_gradients(inputs), None, None
