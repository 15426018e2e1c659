"""The sums of one metric, and the layout in which all of them are packed (metrics.py)."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], bool]]
"""The shape of each metric, and whether it is a ratio."""


class Sums(NamedTuple):
    """What one metric adds up, float64: numerator and denominator of a ratio, or a total alone."""

    total: Tensor
    divisor: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        return [self.total] if self.divisor is None else [self.total, self.divisor]

    @property
    def layout(self) -> tuple[tuple[int, ...], bool]:
        return tuple(self.total.shape), self.divisor is not None

    def plus(self, other: "Sums") -> "Sums":
        if self.divisor is None or other.divisor is None:
            return Sums(self.total + other.total)
        return Sums(self.total + other.total, self.divisor + other.divisor)


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """The shape of a value of the metric `name`; ValueError for more than one dimension."""
    if not torch.is_tensor(value):
        return ()
    if value.dim() > 1:
        raise ValueError(
            f"metric {name!r} got a tensor of shape {tuple(value.shape)}; "
            "record a scalar or a 1-D tensor"
        )
    return tuple(value.shape)


def describe_kind(shape: tuple[int, ...], ratio: bool) -> str:
    """ratio of 3 values; sum of one value"""
    size = f"{shape[0]} values" if shape else "one value"
    return f"{'ratio' if ratio else 'sum'} of {size}"


def hash_of_layout(layout: Layout, maxima: Iterable[str]) -> int:
    """52 bits of the layout's hash: exact in float64."""
    digest = hashlib.sha256(repr((layout, list(maxima))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 12
