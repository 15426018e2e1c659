"""Operands of the layers' passes, what megatron-core computes from them, and the exact values."""

from collections.abc import Callable

import torch

EPSILON = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """hidden and weight; one row is far from unit size, and one is zero where there are several."""
    hidden = random(*shape)
    hidden[0] *= 100.0
    if len(hidden) > 1:
        hidden[1] = 0.0
    return hidden.to(dtype), (1.0 + 0.1 * random(shape[-1], seed=1)).to(dtype)


def swiglu_problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return ((3.0 * random(*shape)).to(dtype),)


def rotary_problem(
    leading: tuple[int, int], groups: int, queries: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Queries, and keys inside a joint product, as megatron-core hands them over."""
    mixed = random(*leading, groups, (queries + 2) * size).to(dtype)
    query, key, _ = mixed.split([queries * size, size, size], dim=3)
    return query.reshape(*leading, -1, size), key


def angles(tokens: int, size: int) -> torch.Tensor:
    """megatron-core's table [S, D]: position times frequency, twice; positions up to 30000."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
    position = torch.linspace(0, 30000, tokens).round()
    return torch.outer(position, frequency).repeat(1, 2)


def megatron_rotary(heads: torch.Tensor, angle_SD: torch.Tensor) -> torch.Tensor:
    """_apply_rotary_pos_emb_bshd of megatron-core: cosines, sines and products in heads' dtype."""
    cosine, sine = (
        table[:, None, None].to(heads.dtype) for table in (angle_SD.cos(), angle_SD.sin())
    )
    x, y = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-y, x), dim=-1) * sine


def megatron_split_rotary(mixed: torch.Tensor, angle_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SelfAttention's split of the joint product, then the rotary embedding."""
    size = angle_SD.shape[-1]
    query, key, value = mixed.split([mixed.shape[-1] - 2 * size, size, size], dim=3)
    query = query.reshape(*mixed.shape[:2], -1, size)
    return megatron_rotary(query, angle_SD), megatron_rotary(key, angle_SD), value


def megatron_swiglu(joint: torch.Tensor) -> torch.Tensor:
    """MLP.forward without fusion."""
    gate, up = joint.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def exact_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden * (hidden.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


def exact_swiglu(joint: torch.Tensor) -> torch.Tensor:
    gate, up = joint.chunk(2, -1)
    return gate * gate.sigmoid() * up


def results(function: Callable, operands: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What `function` returns, and its operands' gradients under a fixed random upstream one."""
    leaves = tuple(value.detach().requires_grad_() for value in operands)
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        random(*value.shape, seed=7 + place).to(value) for place, value in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return (*(value.detach() for value in outputs), *gradients)


def check(
    kernel: Callable,
    today: Callable,
    exact: Callable,
    operands: tuple[torch.Tensor, ...],
) -> None:
    """Results and gradients of `kernel` are as near to fp64 as those of the code it replaces.

    8 % and one part in 10^7 are the noise of another order of summation, and of roundings to bf16
    that fall differently.
    """
    reference = results(exact, tuple(value.double() for value in operands))
    got = results(kernel, operands)
    before = results(today, operands)
    assert len(got) == len(reference)
    for place, (value, old, true) in enumerate(zip(got, before, reference, strict=True)):
        assert value.shape == true.shape, place
        assert value.dtype == operands[0].dtype, place
        scale = true.norm()
        error, old_error = ((x.double() - true).norm() / scale for x in (value, old))
        assert error <= 1.08 * old_error + 1e-7, (place, error, old_error)
