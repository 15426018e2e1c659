"""layer_passes.rms_norm as one Triton kernel forward, and one and a small sum backward.

A program reads a tile of whole rows once and keeps it in registers, in fp32. In backward each
program walks over tiles of its own and sums their part of the weight's gradient; the parts are then
added up by torch. Both sums are formed in an order that depends on the shape alone: no atomics.

Legend: R rows, H hidden, Q parts of the weight's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_slm.ops.layer_passes import contiguous_rows

__all__ = ["FusedRMSNorm"]

_PARTS = 512
"""Programs of backward at most: about four for each multiprocessor of an H100 or H200. Their parts
of the weight's gradient cost Q H 8 bytes of traffic, 8 % of the pass at 8192 bf16 rows."""
_TILE_VALUES = 2048
"""Values of a tile of several short rows."""


class _NormContext(FunctionCtx):
    """What forward keeps for backward."""

    saved_tensors: tuple[Tensor, ...]


class FusedRMSNorm(torch.autograd.Function):
    """apply(hidden [..., H], weight_H, epsilon)."""

    @staticmethod
    def forward(ctx: _NormContext, hidden: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        hidden_RH = contiguous_rows(hidden)
        normed_RH = torch.empty(hidden_RH.shape, dtype=hidden.dtype, device=hidden.device)
        scale_R = torch.empty(len(hidden_RH), dtype=torch.float32, device=hidden.device)
        grid = _Grid(hidden_RH)
        if hidden.numel():
            _forward_kernel[(grid.tiles,)](
                hidden_RH,
                weight_H,
                normed_RH,
                scale_R,
                len(hidden_RH),
                hidden_RH.shape[1],
                hidden_RH.stride(0),
                epsilon,
                ROWS=grid.rows,
                COLUMNS=grid.columns,
                num_warps=grid.warps,
            )
        ctx.save_for_backward(hidden_RH, weight_H, scale_R)
        return normed_RH.view(hidden.shape)

    @staticmethod
    def backward(ctx: _NormContext, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_RH, weight_H, scale_R = ctx.saved_tensors
        grad_RH = contiguous_rows(grad)
        d_hidden_RH = torch.empty(hidden_RH.shape, dtype=hidden_RH.dtype, device=hidden_RH.device)
        grid = _Grid(hidden_RH)
        tiles_of_a_part = max(1, triton.cdiv(grid.tiles, _PARTS))
        parts = triton.cdiv(grid.tiles, tiles_of_a_part)
        d_weight_QH = torch.empty(
            parts, len(weight_H), dtype=torch.float32, device=hidden_RH.device
        )
        if hidden_RH.numel():
            _backward_kernel[(parts,)](
                grad_RH,
                hidden_RH,
                weight_H,
                scale_R,
                d_hidden_RH,
                d_weight_QH,
                len(hidden_RH),
                hidden_RH.shape[1],
                grad_RH.stride(0),
                hidden_RH.stride(0),
                tiles_of_a_part,
                ROWS=grid.rows,
                COLUMNS=grid.columns,
                num_warps=grid.warps,
            )
        d_weight_H = d_weight_QH.sum(0).to(weight_H.dtype)
        return d_hidden_RH.view(grad.shape), d_weight_H, None


class _Grid:
    """How the rows are cut into tiles."""

    def __init__(self, hidden_RH: Tensor):
        rows, columns = hidden_RH.shape
        self.columns = triton.next_power_of_2(columns)
        self.rows = max(1, _TILE_VALUES // self.columns)
        self.tiles = triton.cdiv(rows, self.rows)
        # 16 values of a tile per thread, as long as threads last.
        self.warps = min(16, max(1, self.rows * self.columns // 512))


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    normed,
    scale,
    rows,
    columns,
    hidden_stride,
    epsilon,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(hidden + row[:, None] * hidden_stride + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    # sqrt_rn and div_rn: Triton's own sqrt and division are approximate.
    root = tl.sqrt_rn(tl.sum(x * x, axis=1) / columns + epsilon)
    inverse = tl.div_rn(1.0, root)
    y = x * inverse[:, None] * w[None, :]
    tl.store(scale + row, inverse, mask=row < rows)
    tl.store(
        normed + row[:, None] * columns + column[None, :],
        y.to(normed.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _backward_kernel(
    grad,
    hidden,
    weight,
    scale,
    d_hidden,
    d_weight,
    rows,
    columns,
    grad_stride,
    hidden_stride,
    tiles_of_a_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    in_row = column < columns
    w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(0, tiles_of_a_part):
        row = (part * tiles_of_a_part + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_row[None, :]
        x = tl.load(
            hidden + row[:, None] * hidden_stride + column[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        g = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        inverse = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        unit = x * inverse
        weighted = g * w[None, :]
        along = (tl.sum(weighted * unit, axis=1) / columns)[:, None]
        tl.store(
            d_hidden + row[:, None] * columns + column[None, :],
            ((weighted - unit * along) * inverse).to(d_hidden.dtype.element_ty),
            mask=inside,
        )
        total += g * unit
    tl.store(d_weight + part * columns + column, tl.sum(total, axis=0), mask=in_row)
