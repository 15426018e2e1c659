"""The elementwise passes of row_passes.py as one Triton kernel each.

Every logit is read from memory as few times as possible:

bytes per logit                       here                          plain torch
softmax_statistics, nothing kept      4                             36
softmax_statistics, bf16 kept         4 + 4 + 2                     42
gradient_from_logits                  4 + 2                         30

Each row is one program, which walks over its columns; sums are formed in a fixed order. The
arithmetic is tested without a GPU under TRITON_INTERPRET=1.

Legend: C rows of a chunk, V vocabulary columns of this tensor rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gradient_from_logits", "softmax_statistics"]


def softmax_statistics(logits_CV: Tensor, kept_CV: Tensor | None) -> tuple[Tensor, Tensor]:
    """As row_passes.softmax_statistics; logits_CV is left as it is unless it is kept_CV."""
    rows, columns = logits_CV.shape
    maximum_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    total_C = torch.empty_like(maximum_C)
    destination = logits_CV if kept_CV is None else kept_CV
    _statistics_kernel[(rows,)](
        logits_CV,
        destination,
        maximum_C,
        total_C,
        columns,
        logits_CV.stride(0),
        destination.stride(0),
        KEEP=kept_CV is not None,
        BLOCK=_block(columns),
        num_warps=8,
    )
    return maximum_C, total_C


def gradient_from_logits(logits_CV: Tensor, lse_C: Tensor, scale_C: Tensor, out_CV: Tensor) -> None:
    """As row_passes.gradient_from_logits; logits_CV is left as it is unless it is out_CV."""
    rows, columns = logits_CV.shape
    block = _block(columns)
    _gradient_kernel[(rows, triton.cdiv(columns, block))](
        logits_CV,
        lse_C.contiguous(),
        scale_C.contiguous(),
        out_CV,
        columns,
        logits_CV.stride(0),
        out_CV.stride(0),
        BLOCK=block,
        num_warps=8,
    )


def _block(columns: int) -> int:
    return min(4096, triton.next_power_of_2(columns))


@triton.jit
def _statistics_kernel(
    logits,
    kept,
    maximum,
    total,
    columns,
    logits_stride,
    kept_stride,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    row_maximum = -float("inf")
    row_total = 0.0
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        x = tl.load(
            logits + row * logits_stride + start + offsets, mask=inside, other=-float("inf")
        )
        higher = tl.maximum(row_maximum, tl.max(x, axis=0))
        # What was summed so far was relative to the old maximum.
        row_total = row_total * tl.exp(row_maximum - higher) + tl.sum(tl.exp(x - higher), axis=0)
        row_maximum = higher
    tl.store(maximum + row, row_maximum)
    tl.store(total + row, row_total)
    if KEEP:
        for start in range(0, columns, BLOCK):
            inside = start + offsets < columns
            x = tl.load(logits + row * logits_stride + start + offsets, mask=inside, other=0.0)
            e = tl.exp(x - row_maximum)
            tl.store(
                kept + row * kept_stride + start + offsets, e.to(kept.dtype.element_ty), mask=inside
            )


@triton.jit
def _gradient_kernel(
    logits, lse, scale, out, columns, logits_stride, out_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    x = tl.load(logits + row * logits_stride + offsets, mask=inside, other=0.0)
    gradient = tl.exp(x - tl.load(lse + row)) * tl.load(scale + row)
    tl.store(out + row * out_stride + offsets, gradient.to(out.dtype.element_ty), mask=inside)
