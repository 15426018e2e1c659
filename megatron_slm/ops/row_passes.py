"""Elementwise passes over a chunk of logits, in plain torch.

Two of them also exist as one fused kernel each, in linear_cross_entropy_triton.py.

Legend: C rows of a chunk, V vocabulary columns of this tensor rank. Logits are fp32 and are
overwritten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_slm.ops.head_plan import HeadPlan


@dataclass(frozen=True)
class RowPasses:
    """The passes that exist in several versions, as this module's functions of the same name."""

    softmax_statistics: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    gradient_from_logits: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def row_passes(plan: HeadPlan) -> RowPasses:
    """The versions that the plan chose."""
    if plan.elementwise == "compiled":
        return _compiled_passes()
    if plan.elementwise == "triton":
        from megatron_slm.ops import linear_cross_entropy_triton as fused

        return RowPasses(fused.softmax_statistics, fused.gradient_from_logits)
    return RowPasses(softmax_statistics, gradient_from_logits)


@cache
def _compiled_passes() -> RowPasses:
    # dynamic=True: one compilation serves every chunk length.
    return RowPasses(
        torch.compile(softmax_statistics, dynamic=True),
        torch.compile(gradient_from_logits, dynamic=True),
    )


def softmax_statistics(logits_CV: Tensor, kept_CV: Tensor | None) -> tuple[Tensor, Tensor]:
    """(maximum_C, total_C) with total = sum of exp(logits - maximum).

    `kept_CV`, which may be logits_CV, receives those exponentials.
    """
    maximum_C = logits_CV.amax(1)
    exponential_CV = logits_CV.sub_(maximum_C[:, None]).exp_()
    total_C = exponential_CV.sum(1)
    if kept_CV is not None and kept_CV is not logits_CV:
        kept_CV.copy_(exponential_CV)
    return maximum_C, total_C


def gradient_from_logits(logits_CV: Tensor, lse_C: Tensor, scale_C: Tensor, out_CV: Tensor) -> None:
    """out = exp(logits - lse) * scale; out may be logits_CV."""
    logits_CV.sub_(lse_C[:, None]).exp_()
    torch.mul(logits_CV, scale_C[:, None], out=out_CV)


def gradient_from_kept(
    kept_NV: Tensor, index_C: Tensor | slice, scale_C: Tensor, out_CV: Tensor
) -> None:
    """out = kept[index] * scale.

    out may be the front of kept_NV when index[j] >= j: kept rows only ever move forward. There is
    no fused kernel of this pass, because kernels that run side by side within one buffer would
    overwrite rows that others still read.
    """
    rows_CV = kept_NV[index_C] if isinstance(index_C, slice) else kept_NV.index_select(0, index_C)
    if out_CV.dtype == kept_NV.dtype:
        torch.mul(rows_CV, scale_C[:, None], out=out_CV)
    else:  # two passes, each vectorised: a product of mixed dtypes takes five times as long on CPUs
        out_CV.copy_(rows_CV).mul_(scale_C[:, None])


def place_target(out_CV: Tensor, column_C: Tensor, owned_C: Tensor, value_C: Tensor) -> None:
    """out[i, column[i]] = value[i] in rows whose target this rank has."""
    present_C = out_CV.gather(1, column_C[:, None])
    out_CV.scatter_(
        1,
        column_C[:, None],
        torch.where(owned_C[:, None], value_C[:, None].to(out_CV.dtype), present_C),
    )


def entropy_and_square(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy_C, sum of p^2) of softmax(logits) over these columns; logits_CV is left as it is."""
    shifted_CV = logits_CV - logits_CV.amax(1, keepdim=True)
    exponential_CV = shifted_CV.exp()
    total_C = exponential_CV.sum(1)
    entropy_C = total_C.log() - shifted_CV.mul_(exponential_CV).sum(1) / total_C
    return entropy_C, exponential_CV.square_().sum(1) / total_C.square()
