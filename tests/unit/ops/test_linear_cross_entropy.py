"""linear_cross_entropy against fp64 plain torch: its options, its errors, the rows it leaves out.

Legend: N tokens, H hidden, V padded vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F

from megatron_slm.ops import head_backward, linear_cross_entropy, weight_gradient

N, H, V, TRUE_V = 90, 48, 160, 150
IGNORED = -100


def problem(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight_VH = (torch.randn(V, H, generator=generator) * 0.4).to(dtype).requires_grad_()
    target_N = torch.randint(0, TRUE_V, (N,), generator=generator)
    target_N[[4, 50]] = IGNORED
    return hidden_NH, weight_VH, target_N


def upstream(case: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight_N = torch.rand(N, generator=generator) + 0.5
    kept_N = torch.rand(N, generator=generator) < 0.6
    return {
        "all": torch.ones(N),
        "weighted": weight_N * kept_N,
        "negative": -weight_N * kept_N,
        "one": torch.zeros(N).index_fill(0, torch.tensor([17]), 2.0),
        "none": torch.zeros(N),
        "ignored only": torch.zeros(N).index_fill(0, torch.tensor([4]), 1.0),
    }[case]


def truth(hidden_NH, weight_VH, target_N, upstream_N, z_loss=0.0):
    """(loss, d hidden, d weight, logits) in fp64, the padding columns cut off."""
    hidden = hidden_NH.detach().double().requires_grad_()
    weight = weight_VH.detach().double().requires_grad_()
    logits_NV = (hidden @ weight.t())[:, :TRUE_V]
    loss_N = F.cross_entropy(logits_NV, target_N, ignore_index=IGNORED, reduction="none")
    loss_N = loss_N + z_loss * logits_NV.logsumexp(1).square() * (target_N != IGNORED)
    (loss_N * upstream_N).sum().backward()
    return loss_N.detach(), hidden.grad, weight.grad, logits_NV.detach()


def error(value, expected) -> float:
    if not expected.any():
        return value.abs().max().item()
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("case", ["all", "weighted", "negative", "one", "none", "ignored only"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_fp32_equals_fp64_plain_torch(mode, case, z_loss):
    hidden, weight, target = problem()
    loss = linear_cross_entropy(
        hidden, weight, target, vocabulary_size=TRUE_V, mode=mode, chunk_tokens=16, z_loss=z_loss
    )
    (loss * upstream(case)).sum().backward()
    for value, expected in zip(
        (loss, hidden.grad, weight.grad),
        truth(hidden, weight, target, upstream(case), z_loss)[:3],
        strict=True,
    ):
        assert error(value, expected) < 1e-5
    assert not weight.grad[TRUE_V:].any()


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_z_loss_where_its_factor_vanishes(mode):
    """1 + 2 z lse = 0 in some row: the gradient is then that of the target alone."""
    hidden, weight, target = problem()
    lse = (hidden @ weight.t())[:, :TRUE_V].logsumexp(1).detach()
    z_loss = -1.0 / (2.0 * lse[17].item())
    loss = linear_cross_entropy(
        hidden, weight, target, vocabulary_size=TRUE_V, mode=mode, z_loss=z_loss
    )
    (loss * upstream("one")).sum().backward()
    for value, expected in zip(
        (loss, hidden.grad, weight.grad),
        truth(hidden, weight, target, upstream("one"), z_loss)[:3],
        strict=True,
    ):
        assert error(value, expected) < 1e-5


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_bf16_losses_are_as_good_as_fp32(mode):
    hidden, weight, target = problem(torch.bfloat16)
    loss = linear_cross_entropy(
        hidden, weight, target, vocabulary_size=TRUE_V, mode=mode, chunk_tokens=16
    )
    (loss * upstream("weighted")).sum().backward()
    loss_ref, d_hidden, d_weight, _ = truth(hidden, weight, target, upstream("weighted"))
    assert loss.dtype == torch.float32
    assert error(loss, loss_ref) < 1e-6
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert error(hidden.grad, d_hidden) < 4e-3
    assert error(weight.grad, d_weight) < 4e-3


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_rows_without_a_gradient_are_never_touched(mode):
    """A NaN row spoils every gradient of plain torch: 0 * NaN = NaN. Here no product reads it."""
    hidden, weight, target = problem()
    kept = upstream("weighted") != 0
    with torch.no_grad():
        hidden[~kept] = torch.nan
    loss = linear_cross_entropy(hidden, weight, target, mode=mode, chunk_tokens=16)
    assert loss[(~kept) & (target != IGNORED)].isnan().all()
    loss.backward(upstream("weighted"))
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[~kept].any()


def test_products_of_backward_see_kept_rows_only(monkeypatch):
    rows_of_dw = []
    rows_of_logits = []
    accumulate = weight_gradient.accumulate_weight_gradient
    logits_into = head_backward.logits_into

    def counting_accumulate(total_VH, gradient_CV, hidden_CH, **options):
        rows_of_dw.append(len(gradient_CV))
        accumulate(total_VH, gradient_CV, hidden_CH, **options)

    def counting_logits_into(out_CV, hidden_CH, weight_VH):
        rows_of_logits.append(len(hidden_CH))
        return logits_into(out_CV, hidden_CH, weight_VH)

    monkeypatch.setattr(weight_gradient, "accumulate_weight_gradient", counting_accumulate)
    monkeypatch.setattr(head_backward, "logits_into", counting_logits_into)
    hidden, weight, target = problem()
    weight_N = upstream("weighted").masked_fill(target == IGNORED, 0.0)
    for mode in ("recompute", "keep"):
        (
            linear_cross_entropy(hidden, weight, target, mode=mode, chunk_tokens=16) * weight_N
        ).sum().backward()
    kept = int((weight_N != 0).sum())
    assert sum(rows_of_dw) == 2 * kept
    assert rows_of_dw[-1] == kept, "keep mode: one weight product over all kept rows"
    assert sum(rows_of_logits) == kept, (
        "recompute mode computes the logits of kept rows again, keep mode none"
    )


@pytest.mark.parametrize(
    "budget_bytes, copies", [(1 << 20, 0), (N * TRUE_V * 4 + TRUE_V * H * 4 - 1, 1)]
)
def test_the_widened_weight_stays_for_backward_while_the_budget_has_room(
    budget_bytes, copies, monkeypatch
):
    shapes = []
    operand = head_backward.operand
    monkeypatch.setattr(
        head_backward,
        "operand",
        lambda tensor, plan: (shapes.append(tuple(tensor.shape)), operand(tensor, plan))[1],
    )
    hidden, weight, target = problem(torch.bfloat16)
    loss = linear_cross_entropy(
        hidden, weight, target, vocabulary_size=TRUE_V, kept_budget_bytes=budget_bytes
    )
    (loss * upstream("weighted")).sum().backward()
    assert shapes.count((TRUE_V, H)) == copies
    _, d_hidden, d_weight, _ = truth(hidden, weight, target, upstream("weighted"))
    assert error(hidden.grad, d_hidden) < 4e-3
    assert error(weight.grad, d_weight) < 4e-3


def test_extras_from_the_same_pass():
    hidden, weight, target = problem()
    names = ("target_rank", "entropy", "sum_squared_probability")
    loss, extras = linear_cross_entropy(
        hidden, weight, target, vocabulary_size=TRUE_V, extras=names, chunk_tokens=16
    )
    loss_ref, _, _, logits = truth(hidden, weight, target, upstream("all"))
    p_NV = logits.softmax(1)
    counted = target != IGNORED
    assert list(extras) == list(names)
    assert not any(values.requires_grad for values in extras.values())
    assert error(loss, loss_ref) < 1e-5
    assert error(extras["entropy"], -(p_NV * p_NV.log()).sum(1)) < 1e-5
    assert error(extras["sum_squared_probability"], p_NV.square().sum(1)) < 1e-5
    rank = (logits > logits.gather(1, target.clamp(min=0)[:, None])).sum(1)
    assert torch.equal(extras["target_rank"][counted], rank[counted])
    assert (extras["target_rank"][~counted] == -1).all()


def test_megatron_layout_transposed_labels_and_scoring_equals_training():
    hidden, weight, target = problem()
    hidden_SBH = hidden.view(N // 2, 2, H)
    labels_BS = target.view(N // 2, 2).t()
    loss_SB = linear_cross_entropy(hidden_SBH, weight, labels_BS.transpose(0, 1))
    assert loss_SB.shape == (N // 2, 2)
    assert torch.equal(loss_SB.flatten(), linear_cross_entropy(hidden, weight, target))
    with torch.no_grad():
        scored = linear_cross_entropy(hidden_SBH, weight, labels_BS.transpose(0, 1))
    assert torch.equal(scored, loss_SB)
    assert not scored.requires_grad


def test_main_grad_takes_the_weight_gradient_by_megatron_core_protocol():
    hidden, weight, target = problem()
    _, _, d_weight, _ = truth(hidden, weight, target, upstream("weighted"))
    for buffer_dtype in (torch.float32, torch.bfloat16):
        for protocol in (True, False):
            parameter = torch.nn.Parameter(weight.detach().clone())
            parameter.main_grad = torch.ones(V, H, dtype=buffer_dtype)
            if protocol:
                parameter.grad_added_to_main_grad = False
            loss = linear_cross_entropy(
                hidden, parameter, target, vocabulary_size=TRUE_V, accumulate_into_main_grad=True
            )
            (loss * upstream("weighted")).sum().backward()
            assert error(parameter.main_grad.double() - 1, d_weight) < (
                1e-5 if buffer_dtype == torch.float32 else 2e-2
            )
            assert (parameter.grad is not None) is protocol
            assert getattr(parameter, "grad_added_to_main_grad", False) is protocol


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_a_frozen_side_gets_no_gradient(frozen, mode):
    hidden, weight, target = problem()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    (
        linear_cross_entropy(hidden, weight, target, vocabulary_size=TRUE_V, mode=mode)
        * upstream("weighted")
    ).sum().backward()
    _, d_hidden, d_weight, _ = truth(hidden, weight, target, upstream("weighted"))
    trained, frozen_side, expected = weight, hidden, d_weight
    if frozen == "weight":
        trained, frozen_side, expected = hidden, weight, d_hidden
    assert error(trained.grad, expected) < 1e-5
    assert frozen_side.grad is None


def test_second_backward_is_refused_when_kept_and_allowed_when_recomputed():
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target, mode="keep").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="mode='recompute'"):
        loss.backward()
    hidden.grad = None
    loss = linear_cross_entropy(hidden, weight, target, mode="recompute").sum()
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.allclose(hidden.grad, 2 * once)


def test_no_tokens_at_all():
    hidden, weight, _ = problem()
    loss = linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    loss.sum().backward()
    assert loss.shape == (0,)
    assert not weight.grad.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target=torch.zeros(N + 1, dtype=torch.int64)), r"target is \(91,\).*must be \(90,\)"),
        (dict(target=torch.zeros(N, dtype=torch.int32)), "int64"),
        (dict(target=torch.full((N,), TRUE_V)), r"id 150; ids must be in \[0, 150\)"),
        (dict(target=torch.full((N,), -1)), "holds id -1"),
        (dict(weight=torch.zeros(V, H + 1)), "the same H"),
        (dict(weight=torch.zeros(V, H, dtype=torch.bfloat16)), "both must be the same"),
        (dict(vocabulary_size=V + 1), f"between 1 and {V}"),
        (dict(extras=("entropie",)), "entropie"),
        (dict(mode="kept"), "one of auto, recompute, keep"),
        (dict(elementwise="triton"), "needs CUDA"),
        (dict(chunk_tokens=0), "at least 1"),
        (dict(accumulate_into_main_grad=True), "main_grad"),
    ],
)
def test_errors_name_value_and_remedy(change, message):
    hidden, weight, target = problem()
    arguments = dict(hidden=hidden, weight=weight, target=target, vocabulary_size=TRUE_V) | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
