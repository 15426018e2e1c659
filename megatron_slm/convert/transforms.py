"""How one tensor of ours becomes Hugging Face's, and back.

Rotary embedding needs no transform: megatron-core's non-interleaved form and Hugging Face's
rotate_half pair the same channels. torch is loaded when a tensor is made, so that a folder's small
files can be judged without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_slm.convert.geometry import Geometry

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How one tensor of ours becomes Hugging Face's (`split`), and back (`join`); each undoes the
    other exactly.
    """

    split: Callable[[Tensor, Geometry], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor], Geometry], Tensor]
    shapes: Callable[[Shape, Geometry], tuple[Shape, ...]]
    """The shapes of Hugging Face's tensors, of the shape of ours."""


def _concatenated(parts: Sequence[Tensor], dimension: int = 0) -> Tensor:
    import torch

    return torch.cat(list(parts), dim=dimension)


def _cut_padding(weight: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    if weight.shape[0] < geometry.vocabulary_size:
        raise ValueError(
            f"the embedding has {weight.shape[0]} rows, fewer than the vocabulary of "
            f"{geometry.vocabulary_size} tokens"
        )
    return (weight[: geometry.vocabulary_size],)


def _add_padding(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Padding rows are zeros: no label ever names them and their logits are excluded everywhere."""
    padding = geometry.padded_vocabulary_size - parts[0].shape[0]
    return _concatenated([parts[0], parts[0].new_zeros(padding, *parts[0].shape[1:])])


def _split_qkv(fused: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    """[(A + 2G)·D, ...] grouped as (query heads of the group, its key head, its value head) per
    group → q [A·D], k [G·D], v [G·D].
    """
    queries = geometry.heads // geometry.groups
    grouped = fused.view(geometry.groups, queries + 2, geometry.head_size, *fused.shape[1:])
    return tuple(part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1))


def _join_qkv(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    grouped = [
        part.view(geometry.groups, -1, geometry.head_size, *part.shape[1:]) for part in parts
    ]
    return _concatenated(grouped, dimension=1).flatten(0, 2)


def _qkv_rows(geometry: Geometry) -> tuple[int, int, int]:
    keys = geometry.groups * geometry.head_size
    return (geometry.heads * geometry.head_size, keys, keys)


SAME = Transform(
    lambda tensor, _: (tensor,),
    lambda parts, _: parts[0],
    lambda shape, _: (shape,),
)
VOCABULARY = Transform(
    _cut_padding, _add_padding, lambda shape, g: ((g.vocabulary_size, *shape[1:]),)
)
"""Rows of vocabulary padding are cut off, and added as zeros."""
QKV = Transform(
    _split_qkv, _join_qkv, lambda shape, g: tuple((rows, *shape[1:]) for rows in _qkv_rows(g))
)
"""Queries, keys and values as three tensors."""
QKV_STACKED = Transform(
    lambda fused, g: (_concatenated(_split_qkv(fused, g)),),
    lambda parts, g: _join_qkv(parts[0].split(_qkv_rows(g)), g),
    lambda shape, _: (shape,),
)
"""All queries, then all keys, then all values, in one tensor."""
GATE_UP = Transform(
    lambda fused, _: tuple(fused.chunk(2)),
    lambda parts, _: _concatenated(parts),
    lambda shape, _: ((shape[0] // 2, *shape[1:]),) * 2,
)
"""Gate and up projection as two tensors."""


def transposed(transform: Transform) -> Transform:
    """`transform`, with every matrix of Hugging Face's stored [inputs, outputs]."""

    def turned(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(part.t().contiguous() for part in parts)

    def shapes(shape: Shape, geometry: Geometry) -> tuple[Shape, ...]:
        return tuple(part[::-1] for part in transform.shapes(shape, geometry))

    return Transform(
        lambda ours, geometry: turned(transform.split(ours, geometry)),
        lambda parts, geometry: transform.join(turned(parts), geometry),
        shapes,
    )
