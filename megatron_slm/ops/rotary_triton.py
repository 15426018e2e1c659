"""layer_passes.rotary and split_rotary as one Triton kernel each way.

A program turns all heads of one token: it reads the token's cosines and sines once, then its heads
in tiles of both halves. The kernel takes and gives tensors of any strides, as long as the values of
a head are contiguous, so neither the split of the joint product nor the layout in which attention
hands back its gradients costs a copy. Backward is the same kernel with the sine's sign changed.

cosine and sine come from torch: Triton's own are approximations that lose digits at large angles,
and an angle is as large as the position.

Legend: as layer_passes.py; K = J + 2 heads of a group in the joint product.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["FusedRotary", "FusedSplitRotary"]

_TILE_VALUES = 1024
"""Values of one half of a tile's heads."""


class _Heads(NamedTuple):
    """Where the heads are read or written; views, with the values of a head contiguous."""

    query_SBGJD: Tensor
    key_SBGD: Tensor
    value_SBGD: Tensor | None
    """Copied as it is; None where it stays where it is."""

    def strides(self) -> tuple[int, ...]:
        value = (0, 0, 0) if self.value_SBGD is None else self.value_SBGD.stride()[:3]
        return (*self.query_SBGJD.stride()[:4], *self.key_SBGD.stride()[:3], *value)


class _RotaryContext(FunctionCtx):
    """What forward keeps for backward."""

    groups: int
    saved_tensors: tuple[Tensor, ...]


class FusedRotary(torch.autograd.Function):
    """apply(query_SBND, key_SBGD, cosine_SP, sine_SP): (query, key), turned."""

    @staticmethod
    def forward(
        ctx: _RotaryContext, query: Tensor, key: Tensor, cosine_SP: Tensor, sine_SP: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.groups = key.shape[2]
        ctx.save_for_backward(cosine_SP, sine_SP)
        return _turn_pair(query, key, ctx.groups, cosine_SP, sine_SP, backward=False)

    @staticmethod
    def backward(
        ctx: _RotaryContext, d_query: Tensor, d_key: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        d_query, d_key = _turn_pair(d_query, d_key, ctx.groups, *ctx.saved_tensors, backward=True)
        return d_query, d_key, None, None


class FusedSplitRotary(torch.autograd.Function):
    """apply(mixed_SBGW, cosine_SP, sine_SP): (query, key, value), query and key turned."""

    @staticmethod
    def forward(
        ctx: _RotaryContext, mixed_SBGW: Tensor, cosine_SP: Tensor, sine_SP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = _parts(_contiguous_heads(mixed_SBGW), 2 * cosine_SP.shape[1])
        ctx.groups = mixed_SBGW.shape[2]
        ctx.save_for_backward(cosine_SP, sine_SP)
        query = _empty(source.query_SBGJD)
        key = _empty(source.key_SBGD)
        value = _empty(source.key_SBGD)
        _launch(source, _Heads(query, key, value), cosine_SP, sine_SP, backward=False)
        return query.flatten(2, 3), key, value

    @staticmethod
    def backward(
        ctx: _RotaryContext, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, None, None]:
        cosine_SP, sine_SP = ctx.saved_tensors
        query = _contiguous_heads(d_query).unflatten(2, (ctx.groups, -1))
        source = _Heads(query, _contiguous_heads(d_key), _contiguous_heads(d_value))
        *leading, queries, size = query.shape
        d_mixed = torch.empty(
            (*leading, (queries + 2) * size), dtype=query.dtype, device=query.device
        )
        _launch(source, _parts(d_mixed, size), cosine_SP, sine_SP, backward=True)
        return d_mixed, None, None


def _turn_pair(
    query: Tensor, key: Tensor, groups: int, cosine_SP: Tensor, sine_SP: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    source = _Heads(
        _contiguous_heads(query).unflatten(2, (groups, -1)), _contiguous_heads(key), None
    )
    target = _Heads(_empty(source.query_SBGJD), _empty(source.key_SBGD), None)
    _launch(source, target, cosine_SP, sine_SP, backward=backward)
    return target.query_SBGJD.flatten(2, 3), target.key_SBGD


def _parts(mixed_SBGW: Tensor, head_size: int) -> _Heads:
    """Views of the joint product."""
    heads_SBGKD = mixed_SBGW.unflatten(-1, (-1, head_size))
    return _Heads(heads_SBGKD[:, :, :, :-2], heads_SBGKD[:, :, :, -2], heads_SBGKD[:, :, :, -1])


def _contiguous_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _launch(
    source: _Heads, target: _Heads, cosine_SP: Tensor, sine_SP: Tensor, *, backward: bool
) -> None:
    tokens, sequences, groups, queries, size = source.query_SBGJD.shape
    if not source.query_SBGJD.numel():
        return
    half = triton.next_power_of_2(size // 2)
    # tl.arange takes powers of two; no more heads than there are.
    heads = min(triton.next_power_of_2(groups * queries), max(1, _TILE_VALUES // half))
    # A kernel takes no None: where values stay where they are, their pointers are not read.
    _turn_kernel[(tokens * sequences,)](
        source.query_SBGJD,
        source.key_SBGD,
        source.key_SBGD if source.value_SBGD is None else source.value_SBGD,
        target.query_SBGJD,
        target.key_SBGD,
        target.key_SBGD if target.value_SBGD is None else target.value_SBGD,
        cosine_SP.contiguous(),
        sine_SP.contiguous(),
        sequences,
        groups,
        queries,
        size // 2,
        source.strides(),
        target.strides(),
        BACKWARD=backward,
        VALUES=source.value_SBGD is not None,
        HEADS=heads,
        HALF=half,
        num_warps=4,
    )


@triton.jit
def _turn_kernel(
    query,
    key,
    value,
    to_query,
    to_key,
    to_value,
    cosine,
    sine,
    sequences,
    groups,
    queries,
    half,
    strides,  # of query s, b, g, j; key s, b, g; value s, b, g
    to_strides,
    BACKWARD: tl.constexpr,
    VALUES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) // sequences
    b = tl.program_id(0).to(tl.int64) % sequences
    d = tl.arange(0, HALF)
    in_half = d < half
    cos = tl.load(cosine + s * half + d, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sine + s * half + d, mask=in_half, other=0.0)[None, :]
    if BACKWARD:
        sin = -sin
    query += s * strides[0] + b * strides[1]
    key += s * strides[4] + b * strides[5]
    to_query += s * to_strides[0] + b * to_strides[1]
    to_key += s * to_strides[4] + b * to_strides[5]
    for start in range(0, groups * queries, HEADS):
        head = (start + tl.arange(0, HEADS)).to(tl.int64)  # a stride may be large
        inside = (head < groups * queries)[:, None] & in_half[None, :]
        g = (head // queries)[:, None]
        j = (head % queries)[:, None]
        place = query + g * strides[2] + j * strides[3] + d[None, :]
        to = to_query + g * to_strides[2] + j * to_strides[3] + d[None, :]
        _turn_tile(place, to, inside, half, cos, sin)
    for start in range(0, groups, HEADS):
        g = (start + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = (g < groups) & in_half[None, :]
        place = key + g * strides[6] + d[None, :]
        _turn_tile(place, to_key + g * to_strides[6] + d[None, :], inside, half, cos, sin)
        if VALUES:
            place = value + s * strides[7] + b * strides[8] + g * strides[9] + d[None, :]
            to = to_value + s * to_strides[7] + b * to_strides[8] + g * to_strides[9] + d[None, :]
            tl.store(to, tl.load(place, mask=inside), mask=inside)
            tl.store(to + half, tl.load(place + half, mask=inside), mask=inside)


@triton.jit
def _turn_tile(place, to, inside, half, cos, sin):
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, (x * cos - y * sin).to(to.dtype.element_ty), mask=inside)
    tl.store(to + half, (y * cos + x * sin).to(to.dtype.element_ty), mask=inside)
