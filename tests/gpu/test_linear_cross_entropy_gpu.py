"""The selective head on a GPU. Skipped without CUDA.

cuBLAS products with fp32 results, Triton passes, memory, Liger's kernels.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from megatron_slm.ops import linear_cross_entropy, plan_head, selected_linear_cross_entropy
from megatron_slm.ops.head_plan import has_triton
from megatron_slm.ops.liger_engine import check_liger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N, H, V, TRUE_V = 700, 256, 2048, 2001
PASSES = [
    "eager",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not has_triton(), reason="triton is not installed")
    ),
]


def problem(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (
        (torch.randn(V, H, generator=generator, device="cuda") * 0.1).to(dtype).requires_grad_()
    )
    target = torch.randint(0, TRUE_V, (N,), generator=generator, device="cuda")
    target[5] = -100
    weight_N = torch.rand(N, generator=generator, device="cuda") * (
        torch.rand(N, generator=generator, device="cuda") < 0.6
    )
    return hidden, weight, target, weight_N


def relative(value, reference) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("elementwise", PASSES)
@pytest.mark.parametrize("mode", ["keep", "recompute", "known"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_fp64(dtype, mode, elementwise):
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, target, weight_N = problem(dtype)
    options = dict(vocabulary_size=TRUE_V, chunk_tokens=128, elementwise=elementwise, z_loss=1e-3)
    if mode == "known":
        total, loss = selected_linear_cross_entropy(hidden, weight, target, weight_N, **options)
    else:
        loss = linear_cross_entropy(hidden, weight, target, mode=mode, **options)
        total = (loss * weight_N).sum()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = (exact[0] @ exact[1].t())[:, :TRUE_V]
    expected = F.cross_entropy(logits, target, reduction="none") + 1e-3 * logits.logsumexp(
        1
    ).square() * (target != -100)
    computed = loss.isfinite()
    assert computed.sum() == N if mode != "known" else computed.sum() > N // 3
    assert relative(loss.detach()[computed], expected.detach()[computed]) < 1e-5, (
        "losses are fp32 sums in every dtype"
    )
    limit = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}[dtype]
    for value, reference in zip(
        torch.autograd.grad(total, (hidden, weight)),
        torch.autograd.grad((expected * weight_N).sum(), exact),
        strict=True,
    ):
        assert relative(value, reference) < limit


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_main_grad_accumulates_in_fp32(mode):
    hidden, weight, target, weight_N = problem(torch.bfloat16)
    parameter = torch.nn.Parameter(weight.detach().clone())
    parameter.main_grad = torch.zeros(V, H, device="cuda")
    parameter.grad_added_to_main_grad = False
    for _ in range(2):
        loss = linear_cross_entropy(
            hidden,
            parameter,
            target,
            vocabulary_size=TRUE_V,
            mode=mode,
            accumulate_into_main_grad=True,
        )
        (loss * weight_N).sum().backward()
    loss = linear_cross_entropy(hidden, weight, target, vocabulary_size=TRUE_V)
    (once,) = torch.autograd.grad((loss * weight_N).sum(), weight)
    assert relative(parameter.main_grad, 2 * once.double()) < 6e-3
    assert parameter.grad_added_to_main_grad


def test_the_plan_uses_fp32_results_and_memory_stays_below_a_quarter_of_the_logits():
    tokens, columns, width = 8192, 32000, 512
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(
        torch.randn(columns, width, device="cuda", dtype=torch.bfloat16) * 0.05
    )
    weight.main_grad = torch.zeros(columns, width, device="cuda")
    target = torch.randint(0, columns, (tokens,), device="cuda")
    plan = plan_head(tokens, columns, torch.bfloat16, hidden.device, mode="recompute")
    assert plan.matmul == "fp32_output"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(
        hidden, weight, target, mode="recompute", accumulate_into_main_grad=True
    ).sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.25 * 6 * tokens * columns, (
        "megatron-core's head holds 6 bytes per logit"
    )


def test_liger_engine_equals_fp64_where_its_kernels_run():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    for package in ("liger_kernel", "cutlass"):  # cutlass: the CuTe DSL its kernels are written in
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; needs liger-kernel[cutedsl]")
    check_liger(torch.bfloat16, torch.device("cuda", torch.cuda.current_device()), H)
    hidden, weight, target, weight_N = problem(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, target, vocabulary_size=TRUE_V, engine="liger")
    assert torch.equal(
        loss, linear_cross_entropy(hidden, weight, target, vocabulary_size=TRUE_V, mode="recompute")
    ), "forward is ours"
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = F.cross_entropy((exact[0] @ exact[1].t())[:, :TRUE_V], target, reduction="none")
    for value, reference in zip(
        torch.autograd.grad((loss * weight_N).sum(), (hidden, weight)),
        torch.autograd.grad((expected * weight_N).sum(), exact),
        strict=True,
    ):
        assert relative(value, reference) < 1e-2


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_bf16_losses_move_fewer_tokens_than_logits_rounded_to_bf16(mode):
    """The selected set by our losses is that of fp64, up to 0.1 % of it.

    Logits rounded to bf16 are the contrast.
    """
    tokens, kept = 8192, 4915
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(tokens, H, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(V, H, generator=generator, device="cuda") * 0.2).bfloat16()
    target = torch.randint(0, V, (tokens,), generator=generator, device="cuda")
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), target, reduction="none")
    reference = exact + 0.3 * torch.randn(
        tokens, generator=generator, device="cuda", dtype=torch.float64
    )

    def chosen(loss):
        return set((loss.double() - reference).topk(kept).indices.tolist())

    ours = linear_cross_entropy(hidden.requires_grad_(), weight, target, mode=mode).detach()
    rounded = F.cross_entropy((hidden @ weight.t()).float(), target, reduction="none").detach()
    assert len(chosen(exact) - chosen(ours)) <= 0.001 * kept < len(chosen(exact) - chosen(rounded))
