"""What layers do between their products: the plain torch passes."""

import pytest
import torch

from megatron_slm.ops import layer_passes
from tests.unit.ops.layer_pass_problems import (
    EPSILON,
    angles,
    megatron_rotary,
    norm_problem,
    random,
    results,
    swiglu_problem,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_torchs_on_fp32_copies(dtype):
    hidden, weight = norm_problem((5, 2, 40), dtype)
    expected = torch.nn.functional.rms_norm(hidden.float(), (40,), weight.float(), EPSILON)
    assert torch.equal(layer_passes.rms_norm(hidden, weight, EPSILON), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_rounds_once(dtype):
    (joint,) = swiglu_problem((5, 2, 48), dtype)
    gate, up = joint.double().chunk(2, -1)
    value, gradient = results(layer_passes.swiglu, (joint,))
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value, (gate * gate.sigmoid() * up).to(dtype), rtol=0.008, atol=1e-6)


def test_rotary_is_megatron_cores():
    size = 16
    table = angles(7, size)
    query, key = random(7, 2, 6, size), random(7, 2, 2, size, seed=1)
    turned = layer_passes.rotary(
        query, key, table[:, : size // 2].cos(), table[:, : size // 2].sin()
    )
    for value, heads in zip(turned, (query, key), strict=True):
        torch.testing.assert_close(value, megatron_rotary(heads, table), rtol=1e-6, atol=1e-6)


def test_the_joint_product_is_split_in_megatron_cores_order():
    """Per group its queries, its key and its value."""
    size, queries = 8, 3
    zero = torch.zeros(4, size // 2)
    heads = torch.arange(2 * (queries + 2), dtype=torch.float32)
    mixed = heads.view(1, 1, 2, -1).repeat_interleave(size, dim=-1).expand(4, 1, 2, -1)
    query, key, value = layer_passes.split_rotary(mixed, zero.cos(), zero)
    assert query[0, 0, :, 0].tolist() == [0, 1, 2, 5, 6, 7]
    assert key[0, 0, :, 0].tolist() == [3, 8]
    assert value[0, 0, :, 0].tolist() == [4, 9]


@pytest.mark.parametrize(
    "cosine",
    [torch.zeros(3, 4), torch.zeros(4, 8), torch.zeros(4, 4, dtype=torch.bfloat16)],
    ids=["tokens", "head size", "dtype"],
)
def test_tables_that_do_not_fit_are_refused(cosine):
    heads = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match=r"cosine is .* need \(4, 4\) torch.float32"):
        layer_passes.rotary(heads, heads, cosine, torch.zeros(4, 4))


@pytest.mark.parametrize("width", [16, 25])
def test_a_group_must_be_whole_heads(width):
    table = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=f"{width} values per group"):
        layer_passes.split_rotary(torch.zeros(4, 1, 2, width), table, table)
