"""The kernels of the layers' passes against fp64 and against the plain torch passes.

Run by test_interpreted_kernels.py, in a process whose Triton interprets.
"""

import pytest
import torch
from triton.language import bfloat16
from triton.runtime import interpreter

from megatron_slm.ops import layer_passes
from megatron_slm.ops.rms_norm_triton import FusedRMSNorm
from megatron_slm.ops.rotary_triton import FusedRotary, FusedSplitRotary
from megatron_slm.ops.swiglu_triton import FusedSwiGLU
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

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def bf16_results_are_rounded_to_nearest(monkeypatch):
    """As a GPU rounds them; Triton's interpreter cuts the last bits off, twice the error."""
    convert = interpreter._convert_float

    def nearest(values, source, target, mode):
        if target != bfloat16:
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(values.copy()).bfloat16().view(torch.int16)
        return rounded.numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 3, 64), (3, 2, 2560), (40, 2, 1000)], ids=lambda shape: str(shape[-1])
)
def test_norm(shape, dtype):
    check(
        lambda x, w: FusedRMSNorm.apply(x, w, EPSILON),
        lambda x, w: layer_passes.plain_rms_norm(x, w, EPSILON),
        exact_norm,
        norm_problem(shape, dtype),
    )


def test_norm_of_rows_that_lie_apart_and_of_a_transposed_gradient():
    """The keys inside the joint product; attention's gradients come with other strides."""
    mixed = random(6, 2, 4, 5, 32)
    key = mixed[:, :, :, 3].detach().requires_grad_()
    weight = torch.ones(32, requires_grad=True)
    gradient = random(2, 4, 6, 32).permute(2, 0, 1, 3)
    assert not key.is_contiguous()
    got = torch.autograd.grad(FusedRMSNorm.apply(key, weight, EPSILON), (key, weight), gradient)
    expected = torch.autograd.grad(
        layer_passes.plain_rms_norm(key, weight, EPSILON), (key, weight), gradient
    )
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)


def test_weight_gradient_of_the_norm_has_one_order_of_summation(monkeypatch):
    """Several parts, the last one shorter; the same bits twice, and those of all rows in fp64."""
    monkeypatch.setattr("megatron_slm.ops.rms_norm_triton._PARTS", 4)
    operands = norm_problem((301, 1, 96), torch.float32)
    gradients = []
    for _ in range(2):
        _, _, d_weight = results(lambda x, w: FusedRMSNorm.apply(x, w, EPSILON), operands)
        gradients.append(d_weight)
    assert torch.equal(*gradients)
    *_, expected = results(
        lambda x, w: layer_passes.plain_rms_norm(x, w, EPSILON),
        tuple(value.double() for value in operands),
    )
    torch.testing.assert_close(gradients[0].double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 48, 1500])
def test_swiglu(features, dtype):
    check(
        FusedSwiGLU.apply,
        megatron_swiglu,
        exact_swiglu,
        swiglu_problem((7, 2, 2 * features), dtype),
    )


def test_swiglu_at_large_gates():
    gate = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0])
    joint = torch.cat((gate, torch.full_like(gate, 3.0)))[None].requires_grad_()
    got = results(FusedSwiGLU.apply, (joint,))
    for value, reference in zip(got, results(layer_passes.plain_swiglu, (joint,)), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups, queries, size", [(1, 1, 2), (2, 4, 64), (3, 1, 80), (5, 7, 128)])
def test_rotary(groups, queries, size, dtype):
    tables = angles(11, size)
    cosine, sine = (table[:, : size // 2] for table in (tables.cos(), tables.sin()))
    check(
        lambda q, k: FusedRotary.apply(q, k, cosine, sine),
        lambda q, k: (megatron_rotary(q, tables), megatron_rotary(k, tables)),
        lambda q, k: (megatron_rotary(q, tables.double()), megatron_rotary(k, tables.double())),
        rotary_problem((11, 2), groups, queries, size, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups, queries, size", [(2, 4, 64), (3, 1, 48), (5, 7, 128)])
def test_split_rotary(groups, queries, size, dtype):
    tables = angles(9, size)
    cosine, sine = (table[:, : size // 2] for table in (tables.cos(), tables.sin()))

    check(
        lambda mixed: FusedSplitRotary.apply(mixed, cosine, sine),
        lambda mixed: megatron_split_rotary(mixed, tables),
        lambda mixed: megatron_split_rotary(mixed, tables.double()),
        (random(9, 2, groups, (queries + 2) * size).to(dtype),),
    )


def test_split_rotary_reads_gradients_of_any_layout():
    """Attention gives its gradients as [b, n, s, d] memory."""
    groups, queries, size = 2, 3, 16
    table = angles(5, size)[:, : size // 2]
    mixed = random(5, 2, groups, (queries + 2) * size).requires_grad_()
    gradients = [
        random(2, heads, 5, size).permute(2, 0, 1, 3)
        for heads in (groups * queries, groups, groups)
    ]
    got, expected = (
        torch.autograd.grad(function(mixed, table.cos(), table.sin()), mixed, gradients)[0]
        for function in (FusedSplitRotary.apply, layer_passes.plain_split_rotary)
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_results_share_no_memory_with_the_joint_product():
    mixed = random(4, 1, 2, 3 * 8)
    table = angles(4, 8)[:, :4]
    for result in FusedSplitRotary.apply(mixed, table.cos(), table.sin()):
        assert result.is_contiguous()
        assert result.untyped_storage().data_ptr() != mixed.untyped_storage().data_ptr()


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_rows_at_all(tokens):
    sequences = 0 if tokens else 2
    hidden = torch.zeros(tokens, sequences, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    FusedRMSNorm.apply(hidden, weight, EPSILON).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    assert FusedSwiGLU.apply(hidden).shape == (tokens, sequences, 4)
    query = torch.zeros(tokens, sequences, 4, 8)
    table = torch.zeros(tokens, 4)
    assert FusedRotary.apply(query, query, table, table)[0].shape == query.shape
