"""Sums and counts under the names of metrics: added over micro-batches and ranks, divided last."""

import torch
from torch import Tensor

MetricSums = dict[str, tuple[Tensor, Tensor]]
"""Name of a metric -> (sum, count), both float64 and of one shape."""


def add(total: MetricSums | None, measured: MetricSums) -> MetricSums:
    """Element-wise sum of two descriptions; a name that only one of them has is kept."""
    result = dict(total or {})
    for name, (value, count) in measured.items():
        if name in result:
            value, count = result[name][0] + value, result[name][1] + count
        result[name] = (value, count)
    return result


def pack(measured: MetricSums) -> Tensor:
    """All sums and counts in one float64 vector, so that one all-reduce adds them over ranks."""
    parts: list[Tensor] = []
    for value, count in measured.values():
        parts += [value.reshape(-1).double(), count.reshape(-1).double()]
    return torch.cat(parts)


def unpack(flat: Tensor, like: MetricSums) -> MetricSums:
    """Inverse of pack; `like` gives names and shapes."""
    result = {}
    start = 0
    for name, (value, _) in like.items():
        end = start + 2 * value.numel()
        total, count = flat[start:end].view(2, *value.shape)
        result[name] = (total, count)
        start = end
    return result
