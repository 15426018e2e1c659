"""The passes of the layers on a GPU: values against fp64, one order of summation, a whole model.

Skipped without CUDA. The arithmetic of the kernels is tested without one in tests/unit/ops.
"""

import pytest
import torch

from megatron_slm.ops import layer_passes
from tests.gpu.test_layers_gpu import losses
from tests.unit.ops.layer_pass_problems import (
    EPSILON,
    angles,
    check,
    exact_norm,
    exact_swiglu,
    megatron_rotary,
    megatron_split_rotary,
    megatron_swiglu,
    norm_problem,
    random,
    results,
    rotary_problem,
    swiglu_problem,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(operands: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    assert layer_passes.runs_fused(operands[0].cuda())
    return tuple(value.cuda() for value in operands)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 4, 2048), (300, 2, 5120), (256, 64, 128), (40, 1, 16384)])
def test_norm(shape, dtype):
    check(
        lambda x, w: layer_passes.rms_norm(x, w, EPSILON),
        lambda x, w: layer_passes.plain_rms_norm(x, w, EPSILON),
        exact_norm,
        on_gpu(norm_problem(shape, dtype)),
    )


def test_weight_gradient_of_the_norm_is_the_same_bits_every_time():
    operands = on_gpu(norm_problem((4096, 4, 1024), torch.bfloat16))
    first, second = (
        results(lambda x, w: layer_passes.rms_norm(x, w, EPSILON), operands)[2] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [48, 1501, 5632])
def test_swiglu(features, dtype):
    check(
        layer_passes.swiglu,
        megatron_swiglu,
        exact_swiglu,
        on_gpu(swiglu_problem((512, 2, 2 * features), dtype)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups, queries, size", [(4, 8, 64), (8, 4, 128), (3, 1, 80)])
@pytest.mark.parametrize("split", [False, True])
def test_rotary(groups, queries, size, dtype, split):
    table = angles(512, size).cuda()
    cosine, sine = (values[:, : size // 2] for values in (table.cos(), table.sin()))
    if split:
        mixed = random(512, 2, groups, (queries + 2) * size).to(dtype)
        check(
            lambda mixed: layer_passes.split_rotary(mixed, cosine, sine),
            lambda mixed: megatron_split_rotary(mixed, table),
            lambda mixed: megatron_split_rotary(mixed, table.double()),
            on_gpu((mixed,)),
        )
    else:
        check(
            lambda q, k: layer_passes.rotary(q, k, cosine, sine),
            lambda q, k: (megatron_rotary(q, table), megatron_rotary(k, table)),
            lambda q, k: (megatron_rotary(q, table.double()), megatron_rotary(k, table.double())),
            on_gpu(rotary_problem((512, 2), groups, queries, size, dtype)),
        )


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"qk_norm": True},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"norm_placement": "after", "qk_norm": True, "qk_norm_over": "all_heads"},
        {"norm_placement": "both", "zero_centered_norms": True},
    ],
    ids=str,
)
def test_a_model_with_the_passes_is_the_model_without(groups, precision, tolerance, model):
    loss, gradient, _ = losses(groups, precision, model=model)
    expected, expected_gradient, _ = losses(groups, precision, model=model, fused_layers="none")
    assert not torch.equal(gradient, expected_gradient), "device.fused_layers changed nothing"
    assert (loss - expected).abs().mean() < tolerance
    assert (gradient - expected_gradient).norm() < 2.5 * tolerance * expected_gradient.norm()


def test_activations_of_a_norm_are_kept_once():
    """The bf16 input and one fp32 per row; an fp32 copy of the input would be three times that."""
    hidden = random(1024, 4, 2048).bfloat16().cuda().requires_grad_()
    weight = torch.ones(2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    normed = layer_passes.rms_norm(hidden, weight, EPSILON)
    extra = torch.cuda.memory_allocated() - before
    assert extra <= normed.nbytes + 4 * 1024 * 4 + 2**20
