"""Scores made comparable: checked, in fp32, and out of reach wherever a token does not compete."""

import math

import torch
from torch import Tensor


def rankable(score: Tensor, eligible: Tensor) -> Tensor:
    """The score in fp32, -inf for every token that does not compete, and +0.0 in place of -0.0.

    A score of -inf is below every finite threshold.
    """
    score = score.detach().float()
    return torch.where(eligible.bool() & (score.abs() < math.inf), score + 0.0, -math.inf)


def check_same_shape(score: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError for a score that is no floating point tensor, another tensor that has not
    its shape, and a token_id that is not int64.
    """
    if not score.is_floating_point():
        raise ValueError(
            f"score must be a floating point tensor, got {score.dtype}; convert it with .float()"
        )
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.shape != score.shape:
            raise ValueError(
                f"{name} must have the shape of score {tuple(score.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if name == "token_id" and tensor.dtype != torch.int64:
            raise ValueError(
                f"token_id must be int64 (ids pass 2^31 in a long run), got {tensor.dtype}"
            )
