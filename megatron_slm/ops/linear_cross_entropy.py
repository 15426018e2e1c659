"""Loss of a linear head, token by token, whose backward computes only the rows that carry a gradient.

    loss = linear_cross_entropy(hidden, weight, target)     # fp32, one per token
    selected = choose(loss.detach())                        # any rule
    (loss * selected).sum().backward()                      # rows outside `selected` cost nothing

Cost per token in units of H * V multiply-adds x 2, k = fraction of rows with a gradient: forward 1; backward 3k (recompute) or
2k (keep). A head that materialises logits: forward 1, backward 2. docs/head.md has the picture and the measurements.

Legend: N tokens (flattened), K rows with a gradient, C rows of a chunk, H hidden, V this tensor rank's true vocabulary columns,
T tensor ranks, M = N / T rows of a sequence-parallel shard. Everything with N, K or C is the same on all tensor ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.ops.head_backward import HeadBackwardInputs, head_gradients
from megatron_slm.ops.head_call import HeadCall, check_inputs, chunks, logit_rows
from megatron_slm.ops.head_plan import KEPT_BUDGET_BYTES, Elementwise, Engine, Mode, plan_head
from megatron_slm.ops.liger_engine import check_liger
from megatron_slm.ops.matmul import logits_into, operand, product_precision
from megatron_slm.ops.row_passes import entropy_and_square, row_passes
from megatron_slm.ops.vocab_parallel import VocabularyShard, combine_lse


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """F.cross_entropy((hidden @ weight.T).float()[..., :vocabulary_size], target, reduction="none"), without keeping the logits.

    Backward touches only rows whose incoming gradient is not zero: mask or weight the loss, and the other rows are free.
    Under no_grad nothing is kept and no graph is made; the loss is the same, bit for bit, for the same plan.

    hidden     [..., H] fp32, bf16 or fp16. Megatron's [S, B, H] goes in as it is.
    weight     [V, H], same dtype; with `tp_group`, this rank's rows of the padded vocabulary (a tied embedding is fine).
    target     int64, hidden's shape without H: for Megatron's [S, B, H] pass labels.transpose(0, 1), and transpose the loss back.
    returns    fp32 loss in nats, target's shape, the same bits on every tensor rank; 0 where target is `ignore_index`.

    tp_group           tensor-parallel group over which the vocabulary is split. Forward: one all-gather of two fp32 vectors.
                       Backward: one all-reduce of the kept rows of d(hidden). Every rank of the group must call forward and
                       backward, with the same incoming gradient; the collectives run also when no row is kept.
    sequence_parallel  hidden is this rank's [S/T, B, H] of Megatron's sequence parallelism (contiguous along the first dimension);
                       target and loss are the whole [S, B]. Rows are gathered in forward, reduce-scattered in backward.
    vocabulary_size    true size; weight rows beyond it are padding: -inf logits, no gradient. None = no padding.
    z_loss             adds z_loss * logsumexp(logits)**2 to each token's loss (PaLM, arXiv 2204.02311, section 5).
    extras             any of "entropy" (nats), "sum_squared_probability", "target_rank" (int64; 0 = the target was the most
                       likely token, -1 = ignored); then (loss, {name: tensor of target's shape, detached}) is returned. "target_rank" with `tp_group`
                       takes one more collective.
    accumulate_into_main_grad   add the weight's gradient in fp32 into weight.main_grad instead of returning it, as megatron-core does
                       with gradient-accumulation fusion: sets weight.grad_added_to_main_grad and returns a placeholder gradient.
    mode, kept_budget_bytes, chunk_tokens, elementwise   how it is computed: see plan.plan_head, and `print(plan_head(...))`. "keep"
                       allows one backward per forward (it reuses what it kept), like Megatron's own loss.

    engine             "liger": backward by Liger-Kernel's Hopper kernel, on the kept rows (liger_engine.py says what it needs and how
                       exact it is); forward, and so the losses, stay as they are. ValueError where it cannot run; never used unasked.

    Losses come from fp32 sums of exact products, also in bf16. The gradient of the weight is accumulated in fp32.
    ValueError: shapes or dtypes that do not fit, unknown options, a target outside the vocabulary (on CPU; on other devices,
    where looking would stall the stream, that token's loss is NaN).
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
        extras=extras,
        accumulate_into_main_grad=accumulate_into_main_grad,
    )
    will_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
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
        will_backward=will_backward,
    )
    if engine == "liger":
        check_liger(hidden.dtype, hidden.device, hidden.shape[-1])
        if z_loss:
            raise ValueError(
                f"z_loss is {z_loss} with engine 'liger', whose kernel has none; use engine 'torch', or z_loss 0."
            )
    head = HeadCall(
        shard,
        plan,
        ignore_index,
        float(z_loss),
        sharded_rows,
        accumulate_into_main_grad,
        tuple(extras),
    )
    rows, target_N = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    loss_N, *extra_N = (
        _LinearCrossEntropy.apply(rows, weight, target_N, head)
        if will_backward
        else _forward(rows, weight, target_N, head)[0]
    )
    loss = loss_N.view(target.shape)
    return (
        (
            loss,
            {name: values.view(target.shape) for name, values in zip(extras, extra_N, strict=True)},
        )
        if extras
        else loss
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, target_N: Tensor, head: HeadCall):
        outputs, saved = _forward(rows, weight, target_N, head)
        ctx.head = head
        ctx.save_for_backward(
            rows, weight, target_N, saved.lse_N, saved.target_logit_N, saved.maximum_N
        )
        # Not saved by save_for_backward: backward works in these very bytes, so it takes them and a second backward must fail.
        ctx.kept_NV, ctx.widened_VH = saved.kept_NV, saved.widened_VH
        # Megatron keeps its accumulation buffer and its flag on the parameter object itself.
        ctx.parameter = weight if head.accumulate_into_main_grad else None
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_loss_N: Tensor, *_):
        head: HeadCall = ctx.head
        kept_NV, widened_VH, ctx.kept_NV, ctx.widened_VH = ctx.kept_NV, ctx.widened_VH, None, None
        if head.plan.mode == "keep" and kept_NV is None:
            raise RuntimeError(
                "linear_cross_entropy(mode='keep') allows one backward per forward; use mode='recompute' with retain_graph."
            )
        rows, weight, target_N, lse_N, target_logit_N, maximum_N = ctx.saved_tensors
        gradients = head_gradients(
            HeadBackwardInputs(
                head=head,
                rows=rows,
                weight=weight,
                target_N=target_N,
                upstream_N=torch.where(target_N == head.ignore_index, 0.0, grad_loss_N.float()),
                lse_N=lse_N,
                target_logit_N=target_logit_N,
                maximum_N=maximum_N,
                kept_NV=kept_NV,
                widened_VH=widened_VH,
                needs_hidden=ctx.needs_input_grad[0],
                needs_weight=ctx.needs_input_grad[1],
                parameter=ctx.parameter,
            )
        )
        return (*gradients, None, None)


@dataclass
class _Saved:
    """What forward leaves for backward."""

    lse_N: Tensor
    target_logit_N: Tensor
    maximum_N: Tensor
    kept_NV: Tensor | None
    widened_VH: Tensor | None


def _forward(
    rows: Tensor, weight: Tensor, target_N: Tensor, head: HeadCall
) -> tuple[list[Tensor], _Saved]:
    """([loss_N, extras...], what backward needs). Computes this rank's columns chunk by chunk, then combines the ranks once."""
    shard = head.shard
    rows_NH = shard.gather_rows(rows) if head.sequence_parallel else rows
    column_N, owned_N = shard.local_target(target_N)
    fields_FN = torch.zeros(
        (2 + len(head.extras), len(target_N)), dtype=torch.float32, device=rows.device
    )
    fields_FN[0].fill_(-torch.inf)
    maximum_N = torch.full_like(fields_FN[0], -torch.inf)
    kept_NV = (
        logit_rows(rows, len(target_N), shard.columns, head.plan.kept_dtype)
        if head.plan.mode == "keep"
        else None
    )
    widened_VH = None
    if shard.columns and len(target_N):
        weight_VH = operand(weight[: shard.columns], head.plan)
        if (
            kept_NV is not None
            and weight_VH.dtype != weight.dtype
            and weight_VH.nbytes <= head.plan.spare_bytes
        ):
            widened_VH = (
                weight_VH  # copying it again in backward costs 2 to 3 % of the head at 1024 tokens
            )
        with product_precision(head.plan):
            _forward_chunks(
                rows_NH, weight, weight_VH, column_N, owned_N, head, fields_FN, maximum_N, kept_NV
            )
    elif "target_rank" in head.extras:
        _true_target_logit(rows_NH, weight, column_N, owned_N, shard)
    ranks = shard.gather_fields(fields_FN)
    lse_N = combine_lse([fields[0] for fields in ranks])
    target_logit_N = (
        torch.stack([fields[1] for fields in ranks]).sum(0) if len(ranks) > 1 else ranks[0][1]
    )
    loss_N = lse_N - target_logit_N
    if head.z_loss:
        loss_N = loss_N + head.z_loss * lse_N.square()
    ignored_N = target_N == head.ignore_index
    loss_N = loss_N.masked_fill(
        ~ignored_N & ((target_N < 0) | (target_N >= shard.vocabulary_size)), torch.nan
    ).masked_fill(ignored_N, 0.0)
    extras = [
        _combine_extra(
            name, [fields[2 + i] for fields in ranks], [fields[0] for fields in ranks], lse_N
        )
        for i, name in enumerate(head.extras)
    ]
    extras = [
        values_N.masked_fill(ignored_N, -1) if name == "target_rank" else values_N
        for name, values_N in zip(head.extras, extras, strict=True)
    ]
    return [loss_N, *extras], _Saved(lse_N, target_logit_N, maximum_N, kept_NV, widened_VH)


def _forward_chunks(
    rows_NH, weight, weight_VH, column_N, owned_N, head: HeadCall, fields_FN, maximum_N, kept_NV
) -> None:
    """Fill this rank's log-sum-exp, target logit and extras, and kept_NV with exp(logits - row maximum) when it is wanted."""
    shard, plan = head.shard, head.plan
    passes = row_passes(plan)
    direct = kept_NV is not None and kept_NV.dtype == torch.float32
    scratch_CV = (
        None if direct else logit_rows(rows_NH, plan.chunk_tokens, shard.columns, torch.float32)
    )
    rank_target_N = (
        _true_target_logit(rows_NH, weight, column_N, owned_N, shard)
        if "target_rank" in head.extras
        else None
    )
    for chunk in chunks(0, len(rows_NH), plan.chunk_tokens):
        kept_CV = None if kept_NV is None else kept_NV[chunk]
        logits_CV = kept_CV if direct else scratch_CV[: chunk.stop - chunk.start]
        logits_into(logits_CV, operand(rows_NH[chunk], plan), weight_VH)
        fields_FN[1, chunk] = (
            logits_CV.gather(1, column_N[chunk, None]).squeeze(1).masked_fill(~owned_N[chunk], 0.0)
        )
        for name, values_N in zip(head.extras, fields_FN[2:], strict=True):
            values_N[chunk] = _chunk_extra(
                name,
                logits_CV,
                None if rank_target_N is None else rank_target_N[chunk],
                column_N[chunk],
                owned_N[chunk],
            )
        maximum_N[chunk], total_C = passes.softmax_statistics(logits_CV, kept_CV)
        fields_FN[0, chunk] = maximum_N[chunk] + total_C.log()


def _true_target_logit(rows_NH, weight, column_N, owned_N, shard: VocabularyShard) -> Tensor:
    """The target's logit, known on every rank before the first chunk: what target_rank compares with."""
    if shard.columns:
        target_logit_N = torch.linalg.vecdot(rows_NH.float(), weight[column_N].float()).masked_fill(
            ~owned_N, 0.0
        )
    else:
        target_logit_N = torch.zeros(len(rows_NH), dtype=torch.float32, device=rows_NH.device)
    return torch.cat(shard.gather_fields(target_logit_N[None])).sum(0)


def _chunk_extra(
    name: str, logits_CV: Tensor, rank_target_C: Tensor | None, column_C: Tensor, owned_C: Tensor
) -> Tensor:
    if name == "target_rank":
        above_C = (logits_CV > rank_target_C[:, None]).sum(1)
        # The target's own column does not beat itself, whatever the two ways of summing its product rounded to.
        own_C = logits_CV.gather(1, column_C[:, None]).squeeze(1)
        return (above_C - (owned_C & (own_C > rank_target_C)).long()).float()
    entropy_C, square_C = entropy_and_square(logits_CV)
    return entropy_C if name == "entropy" else square_C


def _combine_extra(
    name: str, values_TN: list[Tensor], lse_TN: list[Tensor], lse_N: Tensor
) -> Tensor:
    """A quantity of the whole softmax from its values on each rank's columns, with rank_probability = the rank's part of the probability."""
    total_N = torch.zeros_like(lse_N)
    for value_N, rank_lse_N in zip(values_TN, lse_TN, strict=True):
        rank_probability_N = (rank_lse_N - lse_N).exp()
        if name == "entropy":
            total_N += torch.where(
                rank_probability_N > 0, rank_probability_N * (value_N + lse_N - rank_lse_N), 0.0
            )
        elif name == "sum_squared_probability":
            total_N += rank_probability_N.square() * value_N
        else:
            total_N += value_N
    return total_N.long() if name == "target_rank" else total_N
