"""The norm of all gradients, and clipping by it: one host synchronisation per step.

Without Transformer Engine and apex, megatron-core reads the norm of every gradient on the host, one
after another (local_multi_tensor_l2_norm in megatron.core.utils): a synchronisation per parameter.
Here the norms stay on the device until they have become one number, in a few kernels over all
gradients. On a CPU the result has the same bits as megatron-core's.
"""

import math
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.nn.utils import get_total_norm


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """The 2-norm of all gradients of the model as one vector, fp32, the same on every rank.

    Equals megatron-core's ChainedOptimizer.get_grad_norm. A weight that several ranks hold counts
    once. Every rank calls it, between prepare_grads and step_with_ready_grads.
    """
    parts = optimizer.chained_optimizers
    counted = [_counted_gradients(part) for part in parts]
    groups = [part.get_grad_stats_parallel_group() for part in parts]
    if all(group == groups[0] for group in groups):
        counted, groups = [list(chain.from_iterable(counted))], groups[:1]
    squares = [_sum_of_squares(*pair) for pair in zip(counted, groups, strict=True)]
    norms = [square**0.5 for square in torch.cat(squares).tolist()]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


def clip_gradients(optimizer: ChainedOptimizer, norm: float) -> None:
    """Scale all gradients so that their common norm is at most the configured one (0 = any).

    Equals megatron-core's clip_grad_by_total_norm_fp32, in a few kernels instead of two for each
    gradient.
    """
    for part in optimizer.chained_optimizers:
        gradients = [value.grad for value in part.get_parameters() if value.grad is not None]
        scale = part.config.clip_grad / (norm + 1.0e-6)
        if gradients and part.config.clip_grad > 0.0 and scale < 1.0:
            torch._foreach_mul_(gradients, scale)


def _counted_gradients(part: Any) -> list[Tensor]:
    """The gradients that this rank adds to the norm: none that another one adds too.

    part: one of megatron-core's chained optimizers.
    """
    return [
        parameter.grad
        for parameter in part.get_parameters()
        if parameter.grad is not None
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter, getattr(part, "tp_group", None))
    ]


def _sum_of_squares(gradients: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """The squared norm of the gradients of all ranks of the group: fp32 [1], on the device."""
    square = torch.zeros(1, dtype=torch.float32, device=torch.cuda.current_device())
    if gradients:
        square += get_total_norm(gradients) ** 2.0
    dist.all_reduce(square, group=group)
    return square
