"""The plan of a call, which is chosen from sizes alone.

And the control flow of the GPU's plan, run on the CPU with its two products emulated.
"""

import pytest
import torch

from megatron_slm.ops import (
    head_plan,
    linear_cross_entropy,
    matmul,
    plan_head,
    selected_linear_cross_entropy,
)

CPU = torch.device("cpu")


def test_auto_keeps_while_the_budget_holds_and_never_without_backward():
    keep = plan_head(4096, 32000, torch.bfloat16, CPU, kept_budget_bytes=4096 * 32000 * 4)
    assert keep.mode == "keep"
    assert keep.kept_dtype == torch.float32
    assert keep.kept_bytes == 4096 * 32000 * 4
    assert (
        plan_head(4096, 32000, torch.bfloat16, CPU, kept_budget_bytes=4096 * 32000 * 4 - 1).mode
        == "recompute"
    )
    assert (
        plan_head(4, 32, torch.float32, CPU, mode="keep", will_backward=False).mode == "recompute"
    )


def test_gpu_scratch_stays_a_sixth_of_a_materialised_head():
    """Megatron's head holds 6 bytes per logit (bf16 logits, fp32 exponentials)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_plan, "_matmul", lambda dtype, device: "fp32_output")
        patch.setattr(head_plan, "_elementwise", lambda *_: "eager")
        for tokens, columns in ((8192, 131072), (16384, 32000), (8192, 128256), (8192, 16032)):
            plan = plan_head(
                tokens, columns, torch.bfloat16, torch.device("cuda"), mode="recompute"
            )
            scratch_bytes = (
                plan.chunk_tokens * columns * 4 + plan.gradient_chunk_tokens * columns * 2
            )
            assert scratch_bytes <= 0.18 * 6 * tokens * columns
            assert plan.chunk_tokens % 128 == 0


def test_low_precision_never_multiplies_in_low_precision_on_cpu():
    assert plan_head(4, 32, torch.float32, CPU).matmul == "direct"
    for dtype in (torch.bfloat16, torch.float16):
        assert plan_head(4, 32, dtype, CPU).matmul.startswith("widened")


def test_small_models_are_not_compiled():
    assert plan_head(4096, 32000, torch.float32, CPU).elementwise == "eager"


def test_compiled_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(head_plan, "has_compiler", lambda: False)
    with pytest.raises(ValueError, match="Install g\\+\\+"):
        plan_head(4, 32, torch.float32, CPU, elementwise="compiled")


def product_with_out_dtype(product):
    """CPU has no kernel for out_dtype: compute on widened operands, as the GPU does inside."""

    def emulated(*operands, out_dtype=None, out=None, **options):
        if out_dtype is None:
            return product(*operands, out=out, **options)
        assert all(operand.dtype == torch.bfloat16 for operand in operands[-2:]), (
            "the GPU multiplies bf16 operands"
        )
        return product(*(operand.to(out_dtype) for operand in operands), out=out, **options)

    return emulated


@pytest.fixture
def gpu_plan(monkeypatch):
    """Every call plans as on a GPU: bf16 operands with fp32 results, grouped weight products."""
    monkeypatch.setattr(head_plan, "_matmul", lambda dtype, device: "fp32_output")
    monkeypatch.setattr(torch, "mm", product_with_out_dtype(torch.mm))
    monkeypatch.setattr(torch, "addmm", product_with_out_dtype(torch.addmm))


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 32, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(80, 32, generator=generator) * 0.4).bfloat16().requires_grad_()
    weight_N = torch.rand(100, generator=generator) * (torch.rand(100, generator=generator) < 0.6)
    return hidden, weight, torch.randint(0, 75, (100,), generator=generator), weight_N


@pytest.mark.parametrize("one_step", [True, False])
@pytest.mark.parametrize("mode", ["keep", "recompute", "known"])
def test_gpu_control_flow_gives_the_same_gradients(mode, one_step, gpu_plan, monkeypatch):
    monkeypatch.setattr(matmul, "_addmm_takes_an_fp32_total", lambda *_: one_step)
    hidden, weight, target, weight_N = problem()
    options = dict(vocabulary_size=75, chunk_tokens=4)
    if mode == "known":
        total, _ = selected_linear_cross_entropy(hidden, weight, target, weight_N, **options)
    else:
        total = (
            linear_cross_entropy(hidden, weight, target, mode=mode, **options) * weight_N
        ).sum()
    got = torch.autograd.grad(total, (hidden, weight))
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    logits = (exact[0] @ exact[1].t())[:, :75]
    expected = torch.autograd.grad(
        (torch.nn.functional.cross_entropy(logits, target, reduction="none") * weight_N).sum(),
        exact,
    )
    for value, other in zip(got, expected, strict=True):
        assert (value.float() - other).norm() < 6e-3 * other.norm()


def test_kept_bf16_exponentials_do_not_drown_a_confident_token(gpu_plan):
    """p = 0.99995 rounds to 1 in bf16; its gradient p - 1 must not."""
    hidden = torch.tensor([[4.0, 0.0]], dtype=torch.bfloat16).requires_grad_()
    weight = torch.tensor([[2.5, 0.0], [0.0, 1.0]], dtype=torch.bfloat16).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.tensor([0]), mode="keep").sum().backward()
    expected = torch.sigmoid(torch.tensor(10.0, dtype=torch.float64)) - 1
    assert hidden.grad[0, 0].item() == pytest.approx(2.5 * expected.item(), rel=1e-2)


def test_gpu_plan_groups_weight_products():
    plan = plan_head(8192, 128256, torch.bfloat16, CPU, mode="recompute")
    assert plan.gradient_chunk_tokens == plan.chunk_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_plan, "_matmul", lambda dtype, device: "fp32_output")
        recompute = plan_head(8192, 128256, torch.bfloat16, CPU, mode="recompute")
        keep = plan_head(8192, 128256, torch.bfloat16, CPU, mode="keep")
    assert keep.kept_dtype == torch.bfloat16
    assert keep.kept_bytes == 8192 * 128256 * 2
    assert recompute.gradient_chunk_tokens == 6 * recompute.chunk_tokens
    assert keep.gradient_chunk_tokens == 8192


@pytest.mark.slow
@pytest.mark.skipif(not head_plan.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_compiled_passes_give_the_eager_results(mode):
    """About half a minute: torch.compile runs the C++ compiler."""
    hidden, weight, target, weight_N = problem()
    results = []
    for elementwise in ("eager", "compiled"):
        loss = linear_cross_entropy(
            hidden, weight, target, mode=mode, chunk_tokens=16, elementwise=elementwise
        )
        results.append(
            (loss.detach(), *torch.autograd.grad((loss * weight_N).sum(), (hidden, weight)))
        )
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-5)
