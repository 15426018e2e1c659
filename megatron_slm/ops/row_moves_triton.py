"""row_moves.py's three passes as one Triton kernel each.

Programs take a block of columns of one row. Each row is written by one program, so nothing depends
on an order.

Legend: as row_moves.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["has_gradient", "spread", "take"]

_BLOCK = 1024


def has_gradient(grad_NBP: Tensor) -> Tensor:
    """As row_moves.has_gradient."""
    grad_NBP = _blocks(grad_NBP)
    rows, blocks, columns = grad_NBP.shape
    found_N = torch.zeros(rows, dtype=torch.uint8, device=grad_NBP.device)
    if grad_NBP.numel():
        _has_gradient_kernel[(rows,)](
            grad_NBP,
            found_N,
            blocks,
            columns,
            grad_NBP.stride(0),
            grad_NBP.stride(1),
            BLOCK=_block(columns),
        )
    return found_N.view(torch.bool)


def take(rows_NBP: Tensor, index_K: Tensor) -> Tensor:
    """The rows of `index_K` as contiguous [K, B P]."""
    rows_NBP = _blocks(rows_NBP)
    _, blocks, columns = rows_NBP.shape
    taken_KP = torch.empty(
        len(index_K), blocks * columns, dtype=rows_NBP.dtype, device=rows_NBP.device
    )
    if taken_KP.numel():
        block = _block(columns)
        _take_kernel[(len(index_K), triton.cdiv(columns, block), blocks)](
            rows_NBP,
            index_K,
            taken_KP,
            columns,
            rows_NBP.stride(0),
            rows_NBP.stride(1),
            taken_KP.stride(0),
            BLOCK=block,
        )
    return taken_KP


def spread(values_KI: Tensor, place_N: Tensor, onto_NI: Tensor | None) -> Tensor:
    """As Rows.spread; sums are fp32 and rounded once."""
    values_KI = values_KI.contiguous()
    rows, columns = len(place_N), values_KI.shape[1]
    total_NI = onto_NI
    if total_NI is None:
        total_NI = torch.empty(rows, columns, dtype=values_KI.dtype, device=values_KI.device)
    if total_NI.numel():
        block = _block(columns)
        _spread_kernel[(rows, triton.cdiv(columns, block))](
            values_KI,
            place_N,
            total_NI,
            columns,
            total_NI.stride(0),
            ADD=onto_NI is not None,
            BLOCK=block,
        )
    return total_NI


def _blocks(rows: Tensor) -> Tensor:
    """[N, B, P] with contiguous columns."""
    rows_NBP = rows if rows.dim() == 3 else rows.unsqueeze(1)
    return rows_NBP if rows_NBP.stride(2) == 1 else rows_NBP.contiguous()


def _block(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))


@triton.jit
def _has_gradient_kernel(
    grad, found, blocks, columns, row_stride, block_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    any_there = tl.zeros((BLOCK,), dtype=tl.int32)
    for b in range(0, blocks):
        for start in range(0, columns, BLOCK):
            column = start + offsets
            x = tl.load(
                grad + row * row_stride + b * block_stride + column,
                mask=column < columns,
                other=0.0,
            )
            any_there |= (x.to(tl.float32) != 0.0).to(tl.int32)
    tl.store(found + row, tl.max(any_there, axis=0).to(tl.uint8))


@triton.jit
def _take_kernel(
    source, index, taken, columns, row_stride, block_stride, taken_stride, BLOCK: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    row = tl.load(index + k)
    values = tl.load(source + row * row_stride + b * block_stride + column, mask=inside)
    tl.store(taken + k * taken_stride + b * columns + column, values, mask=inside)


@triton.jit
def _spread_kernel(
    values, place, total, columns, total_stride, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    # Negative in a row that has no values: its place is -1.
    source = tl.load(place + row) * columns + column
    x = tl.load(values + source, mask=inside & (source >= 0), other=0.0)
    to = total + row * total_stride + column
    if ADD:
        sum = x.to(tl.float32) + tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, sum.to(total.dtype.element_ty), mask=inside)
    else:
        tl.store(to, x, mask=inside)
