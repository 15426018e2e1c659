"""RMSNorm of rows whose values are spread over the ranks of a group.

Legend: R rows, P values of a row on this rank, W values of a row on all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def split_rms_norm(
    hidden: Tensor, weight_P: Tensor, epsilon: float, group: dist.ProcessGroup
) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + epsilon) * weight, the mean over the row of all ranks.

    Equals this rank's part of torch.nn.functional.rms_norm of the whole rows, and so do the
    gradients. hidden [..., P] and the result are fp32, bf16 or fp16, P the same on every rank;
    arithmetic is fp32 with one rounding. Forward and backward each all-reduce one fp32 number per
    row; backward keeps `hidden` and that number.
    """
    return _SplitRMSNorm.apply(hidden, weight_P, epsilon, group)


class _Context(FunctionCtx):
    group: dist.ProcessGroup
    saved_tensors: tuple[Tensor, ...]


class _SplitRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight_P: Tensor, epsilon: float, group: dist.ProcessGroup
    ) -> Tensor:
        values = hidden.float()
        mean_square = _mean_over_ranks(values.square(), group)
        inverse = torch.rsqrt(mean_square + epsilon)
        ctx.group = group
        ctx.save_for_backward(hidden, weight_P, inverse)
        return (values * inverse * weight_P.float()).to(hidden.dtype)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight_P, inverse = ctx.saved_tensors
        unit = hidden.float() * inverse
        grad = grad.float()
        weighted = grad * weight_P.float()
        along = _mean_over_ranks(weighted * unit, ctx.group)
        d_hidden = ((weighted - unit * along) * inverse).to(hidden.dtype)
        d_weight_P = (grad * unit).flatten(0, -2).sum(0).to(weight_P.dtype)
        return d_hidden, d_weight_P, None, None


def _mean_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean of the last dimension, W = P x ranks values: [..., 1]."""
    total = values.sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return total / (values.shape[-1] * group.size())
