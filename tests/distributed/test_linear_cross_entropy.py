"""The selective head over tensor ranks against one unsharded fp64 computation: loss, gradients,
tied weights, main_grad.

One spawn of 4 gloo processes serves every layout: groups of 1, 2 and 4 ranks.
Legend: S positions, B sequences, N = S * B tokens, H hidden, V padded vocabulary.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_slm.ops import linear_cross_entropy, selected_linear_cross_entropy
from megatron_slm.testing.spawn import run_layouts_on_cpu, run_processes

S, B, H, V, TRUE_V = 12, 2, 32, 96, 61  # with 4 ranks the last shard (72..95) is padding only
RANKS = 4
IGNORED = -100
Z = 0.01


def weights_of(case: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight_SB = torch.rand(S, B, generator=generator) + 0.5
    if case == "top":
        weight_SB[torch.rand(S, B, generator=generator) < 0.4] = 0.0
    elif case == "one row":
        keep = weight_SB[9, 1].clone()
        weight_SB.zero_()[9, 1] = keep
    elif case == "no rows":
        weight_SB.zero_()
    return weight_SB


def problem(dtype: torch.dtype):
    torch.manual_seed(0)
    hidden_SBH = torch.randn(S, B, H).to(dtype)
    weight_VH = (torch.randn(V, H) * 0.3).to(dtype)
    target_SB = torch.randint(0, TRUE_V, (S, B))
    target_SB[3, 1] = target_SB[9, 0] = IGNORED
    return hidden_SBH, weight_VH, target_SB


def truth(hidden_SBH, weight_VH, target_SB, weight_SB, tied_id_SB=None):
    """fp64 (loss, d hidden, d weight, entropy); with ids the hidden state also comes through the
    tied embedding.
    """
    hidden = hidden_SBH.double().requires_grad_()
    weight = weight_VH.double().requires_grad_()
    states = hidden + (F.embedding(tied_id_SB, weight) if tied_id_SB is not None else 0.0)
    logits = (states @ weight.t())[..., :TRUE_V]
    lse_SB = logits.logsumexp(-1)
    loss_SB = F.cross_entropy(
        logits.flatten(0, 1), target_SB.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(S, B)
    loss_SB = loss_SB + Z * lse_SB.square() * (target_SB != IGNORED)
    (loss_SB * weight_SB).sum().backward()
    return (
        loss_SB.detach(),
        hidden.grad,
        weight.grad,
        torch.distributions.Categorical(logits=logits.detach()).entropy(),
    )


def assert_close(
    value: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str
) -> None:
    scale = max(expected.norm().item(), 1e-30)
    error = (
        (value.double() - expected).norm().item() / scale
        if expected.any()
        else value.abs().max().item()
    )
    limit = (
        1e-5 if dtype == torch.float32 else 6e-3
    )  # bf16: a gradient rounded once or twice to 8 bits
    assert error < limit, f"{what}: relative error {error:.2e}"


def shard(tensor: torch.Tensor, group) -> torch.Tensor:
    return tensor.chunk(group.size())[group.rank()].clone()


def gather(tensor: torch.Tensor, group) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def check_layout(group, dtype, case, sequence_parallel, mode):
    hidden_SBH, weight_VH, target_SB = problem(dtype)
    weight_SB = weights_of(case)
    loss_ref, d_hidden_ref, d_weight_ref, entropy_ref = truth(
        hidden_SBH, weight_VH, target_SB, weight_SB
    )
    hidden = (
        shard(hidden_SBH, group) if sequence_parallel else hidden_SBH.clone()
    ).requires_grad_()
    weight = shard(weight_VH, group).requires_grad_()
    options = dict(
        tp_group=group,
        sequence_parallel=sequence_parallel,
        vocabulary_size=TRUE_V,
        z_loss=Z,
        chunk_tokens=5,
    )
    loss_SB, extras = linear_cross_entropy(
        hidden, weight, target_SB, mode=mode, extras=("entropy", "target_rank"), **options
    )
    (loss_SB * weight_SB).sum().backward()
    what = f"tp={group.size()} {dtype} {case} sp={sequence_parallel} {mode}"
    d_hidden = gather(hidden.grad, group) if sequence_parallel else hidden.grad
    # Losses come from fp32 sums whatever the operands' dtype.
    assert_close(loss_SB, loss_ref, torch.float32, f"loss, {what}")
    assert_close(extras["entropy"], entropy_ref, torch.float32, f"entropy, {what}")
    assert_close(d_hidden, d_hidden_ref, dtype, f"d hidden, {what}")
    assert_close(gather(weight.grad, group), d_weight_ref, dtype, f"d weight, {what}")
    assert not gather(weight.grad, group)[TRUE_V:].any(), "padded vocabulary rows got a gradient"
    everyone = gather(loss_SB.detach()[None], group)
    assert all(torch.equal(everyone[0], other) for other in everyone), (
        f"tensor ranks disagree about a loss, {what}"
    )
    with torch.no_grad():
        scored = linear_cross_entropy(hidden, weight, target_SB, **options)
    assert torch.equal(scored, loss_SB), f"scoring differs from training, {what}"
    return extras["target_rank"]


def check_known_selection(group, dtype, case, sequence_parallel):
    hidden_SBH, weight_VH, target_SB = problem(dtype)
    weight_SB = weights_of(case)
    loss_ref, d_hidden_ref, d_weight_ref, _ = truth(hidden_SBH, weight_VH, target_SB, weight_SB)
    hidden = (
        shard(hidden_SBH, group) if sequence_parallel else hidden_SBH.clone()
    ).requires_grad_()
    weight = shard(weight_VH, group).requires_grad_()
    loss_sum, loss_SB = selected_linear_cross_entropy(
        hidden,
        weight,
        target_SB,
        weight_SB,
        tp_group=group,
        sequence_parallel=sequence_parallel,
        vocabulary_size=TRUE_V,
        z_loss=Z,
        chunk_tokens=5,
    )
    (3.0 * loss_sum).backward()
    what = f"known selection, tp={group.size()} {dtype} {case} sp={sequence_parallel}"
    computed_SB = (weight_SB != 0) & (target_SB != IGNORED)
    assert torch.equal(loss_SB.isnan(), ~computed_SB), what
    assert_close(loss_sum.detach(), (loss_ref * weight_SB).sum(), torch.float32, what)
    d_hidden = gather(hidden.grad, group) if sequence_parallel else hidden.grad
    assert_close(d_hidden, 3.0 * d_hidden_ref, dtype, f"d hidden, {what}")
    assert_close(gather(weight.grad, group), 3.0 * d_weight_ref, dtype, f"d weight, {what}")


class EmbeddingSum(torch.autograd.Function):
    """Sum of every rank's part of the embedding; this rank's positions of it under sequence
    parallelism, as megatron-core's does.
    """

    @staticmethod
    def forward(ctx, partial_SBH, group, sequence_parallel):
        ctx.gathers = (group,) if sequence_parallel else ()
        total_SBH = partial_SBH.clone()
        dist.all_reduce(total_SBH, group=group)
        return shard(total_SBH, group) if sequence_parallel else total_SBH

    @staticmethod
    def backward(ctx, grad):
        for group in ctx.gathers:
            grad = gather(grad, group)
        return grad, None, None


def check_tied(group, dtype, case, sequence_parallel, into_main_grad):
    """One weight as embedding and head. With megatron-core's accumulation protocol main_grad gets
    the head's part, autograd the embedding's.
    """
    hidden_SBH, weight_VH, target_SB = problem(dtype)
    weight_SB = weights_of(case)
    id_SB = torch.randint(0, TRUE_V, (S, B), generator=torch.Generator().manual_seed(3))
    loss_ref, d_hidden_ref, d_weight_ref, _ = truth(
        hidden_SBH, weight_VH, target_SB, weight_SB, tied_id_SB=id_SB
    )
    hidden = (
        shard(hidden_SBH, group) if sequence_parallel else hidden_SBH.clone()
    ).requires_grad_()
    weight = torch.nn.Parameter(shard(weight_VH, group))
    if into_main_grad:
        weight.main_grad = torch.ones(weight.shape)
        weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = True
    first = group.rank() * len(weight)
    owned_SB = (id_SB >= first) & (id_SB < first + len(weight))
    embedded = F.embedding((id_SB - first).where(owned_SB, 0), weight) * owned_SB[..., None]
    states = hidden + EmbeddingSum.apply(embedded, group, sequence_parallel)
    loss_SB = linear_cross_entropy(
        states,
        weight,
        target_SB,
        tp_group=group,
        sequence_parallel=sequence_parallel,
        vocabulary_size=TRUE_V,
        z_loss=Z,
        accumulate_into_main_grad=into_main_grad,
    )
    (loss_SB * weight_SB).sum().backward()
    what = (
        f"tied, tp={group.size()} {dtype} {case} sp={sequence_parallel} main_grad={into_main_grad}"
    )
    if dtype == torch.float32:  # in bf16 the states themselves are rounded sums
        assert_close(loss_SB, loss_ref, dtype, f"loss, {what}")
    d_weight = weight.grad.float()
    if into_main_grad:
        assert weight.grad_added_to_main_grad, what
        d_weight = d_weight + weight.main_grad - 1.0
    d_hidden = gather(hidden.grad, group) if sequence_parallel else hidden.grad
    assert_close(gather(d_weight, group), d_weight_ref, dtype, f"d weight, {what}")
    assert_close(d_hidden, d_hidden_ref, dtype, f"d hidden, {what}")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        groups = [dist.new_subgroups(size)[0] for size in (1, 2, 4)]
        target_ranks = []
        for group in groups:
            for dtype in (torch.float32, torch.bfloat16):
                for case in ("all rows", "top", "one row", "no rows"):
                    for sequence_parallel in (False, True):
                        for mode in ("keep", "recompute"):
                            target_ranks.append(
                                check_layout(group, dtype, case, sequence_parallel, mode)
                            )
                        check_known_selection(group, dtype, case, sequence_parallel)
                        for into_main_grad in (False, True):
                            check_tied(group, dtype, case, sequence_parallel, into_main_grad)
        assert all(
            torch.equal(target_ranks[0], other)
            for other in target_ranks[:16] + target_ranks[32:48] + target_ranks[64:80]
        )
    finally:
        dist.destroy_process_group()


def test_every_layout_equals_the_unsharded_head():
    with tempfile.TemporaryDirectory() as folder:
        run_processes(worker, (folder,), RANKS)


def distances_from_fp64(groups, name) -> list[dict]:
    """bf16 over tp ranks: relative distance from fp64 of loss, d hidden and d weight, for
    megatron-core's head and both modes of ours.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    generator = torch.Generator().manual_seed(5)
    hidden_SBH = torch.randn(64, 2, H, generator=generator).bfloat16()
    weight_VH = (torch.randn(V, H, generator=generator) * 0.3).bfloat16()
    target_SB = torch.randint(0, V, (64, 2), generator=generator)
    share_SB = (torch.rand(64, 2, generator=generator) < 0.6).float()
    exact = [tensor.double().requires_grad_() for tensor in (hidden_SBH, weight_VH)]
    loss_ref = F.cross_entropy(
        (exact[0] @ exact[1].t()).flatten(0, 1), target_SB.flatten(), reduction="none"
    ).view(64, 2)
    references = [loss_ref.detach(), *torch.autograd.grad((loss_ref * share_SB).sum(), exact)]
    found = []
    for head in ("megatron", "keep", "recompute"):
        hidden = hidden_SBH.clone().requires_grad_()
        weight = shard(weight_VH, groups.tp).requires_grad_()
        if head == "megatron":
            loss = vocab_parallel_cross_entropy(hidden @ weight.t(), target_SB)
        else:
            loss = linear_cross_entropy(hidden, weight, target_SB, tp_group=groups.tp, mode=head)
        (loss * share_SB).sum().backward()
        if head == "megatron":  # its ColumnParallelLinear does this
            dist.all_reduce(hidden.grad, group=groups.tp)
        values = (loss.detach(), hidden.grad, gather(weight.grad, groups.tp))
        found.append(
            {"head": head}
            | {
                n: ((v.double() - r).norm() / r.norm()).item()
                for n, v, r in zip(("loss", "hidden", "weight"), values, references, strict=True)
            }
        )
    return found


def test_bf16_is_no_further_from_fp64_than_megatrons_head_over_tensor_ranks():
    for layout, ranks in run_layouts_on_cpu(
        distances_from_fp64, {"tp2": dict(tp=2), "tp4": dict(tp=4)}
    ).items():
        for megatron, *ours in ranks:
            for head in ours:
                assert all(head[name] <= megatron[name] for name in ("loss", "hidden", "weight")), (
                    layout,
                    head,
                    megatron,
                )
                assert head["loss"] < 1e-6, (layout, head)
