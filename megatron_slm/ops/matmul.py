"""Matrix products whose results are fp32 sums of exact products, on any device.

A bf16 x bf16 product is exact in fp32, so fp32 copies of bf16 operands lose nothing. There are
three ways to the same numbers:

fp32_output         cuBLAS takes bf16 operands and writes fp32: torch.mm(..., out_dtype=float32).
widened             Operands are copied to fp32 first. On CPUs without bf16 units this is also the
                    fast way: torch's own bf16 product there measured 7 to 150 times slower than
                    widening, and besides it rounds its result to bf16.
widened_bf16_units  As widened, and oneDNN is allowed to compute fp32 products with its bf16 units.
                    That is exact here, because the operands are bf16 values, and the result stays
                    fp32, which torch's bf16 product on a CPU would round.

Legend: C rows of a chunk, H hidden, V vocabulary columns of this rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from megatron_slm.ops.head_plan import HeadPlan


def operand(tensor: Tensor, plan: HeadPlan) -> Tensor:
    """`tensor` in the dtype that the products of this plan take."""
    return tensor.float() if plan.matmul.startswith("widened") else tensor


@contextmanager
def product_precision(plan: HeadPlan) -> Iterator[None]:
    """Within this context, fp32 products on a CPU may use bf16 units if the plan says so.

    The setting is global to the process and is restored at the end.
    """
    if plan.matmul != "widened_bf16_units":
        yield
        return
    # torch replaces its own module `mkldnn` by an object while it is imported.
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def logits_into(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """out = hidden @ weight.T in fp32."""
    if hidden_CH.dtype == torch.float32:
        return torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
    return torch.mm(hidden_CH, weight_VH.t(), out_dtype=torch.float32, out=out_CV)


def accumulate_weight_gradient(
    total_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor, *, fresh: bool
) -> None:
    """total += gradient.T @ hidden in fp32; `fresh` overwrites a total that was never written."""
    gradient_VC = gradient_CV.t()
    fp32 = torch.float32
    if hidden_CH.dtype == fp32:
        if fresh:
            torch.mm(gradient_VC, hidden_CH, out=total_VH)
        else:
            torch.addmm(total_VH, gradient_VC, hidden_CH, out=total_VH)
    elif fresh:
        torch.mm(gradient_VC, hidden_CH, out_dtype=fp32, out=total_VH)
    elif _addmm_takes_an_fp32_total(hidden_CH.dtype, hidden_CH.device):
        torch.addmm(total_VH, gradient_VC, hidden_CH, out_dtype=fp32, out=total_VH)
    else:
        total_VH.add_(torch.mm(gradient_VC, hidden_CH, out_dtype=fp32))


@cache
def _addmm_takes_an_fp32_total(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.addmm adds a product of `dtype` operands to an fp32 total on this device.

    torch 2.8 refuses, later releases do it. It is tried once per process, with 8 x 8 values.
    """
    total = torch.zeros(8, 8, device=device)
    matrix = torch.zeros(8, 8, dtype=dtype, device=device)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
