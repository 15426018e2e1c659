"""Liger-Kernel's Hopper kernel as the backward of the head, on the kept rows only. Optional.

    pip install 'liger-kernel[cutedsl]>=0.8.5'      # written against 0.8.5

Its backward makes the logit gradients and both products in one persistent kernel, 1024 rows at a
time, without logits in memory. The kernel itself knows no selection: it is handed the kept rows,
their log-sum-exp and their incoming gradient, and so computes those rows only. Liger's forward is
not used: it rounds logits to fp16 on the way to the softmax, and the losses that decide the
selection are fp32 sums here, whatever the engine.

It is less exact than the torch engine in one way: the weight's gradient is rounded to bf16 after
every 1024 kept rows. It needs bf16 operands, compute capability 9.0 and a hidden size that is a
multiple of 64, and it has no z-loss. Anything else is an error, never a silent change of engine.

Legend: K rows with a gradient, H hidden, V vocabulary columns of this rank.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_MODULE = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
HIDDEN_MULTIPLE = 64
FOREIGN_TARGET = -1
"""The target when another tensor rank has it.

The value is no valid column and not Liger's ignore_index either, so the row keeps its softmax
gradient and no column gets the one-hot term."""
_IGNORE_INDEX = -100
_TOLERANCE = 1e-2
"""Largest relative difference of a gradient.

Roundings of logit gradients and of results to bf16 are 0.2 % each; a wrong formula is off by far
more."""


def liger_gradients(
    rows_KH: Tensor,
    weight_VH: Tensor,
    column_K: Tensor,
    owned_K: Tensor,
    upstream_K: Tensor,
    lse_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d rows [K, H], d weight [V, H]) in bf16: p @ weight and p.T @ rows, with

        p = upstream * (exp(rows @ weight.T - lse) - onehot(column)).

    The one-hot is left out where `owned_K` is False (another tensor rank has the target). lse_K is
    that of the whole vocabulary.
    """
    target_K = column_K.where(owned_K, FOREIGN_TARGET)
    return _kernel()(
        upstream_K,
        rows_KH.contiguous(),
        weight_VH.contiguous(),
        target_K,
        lse_K.contiguous(),
        1.0,
        _IGNORE_INDEX,
        rows_KH.shape[1],
    )


def check_liger(dtype: torch.dtype, device: torch.device, hidden_size: int) -> None:
    """Return when the engine can run these operands on this device, and computes the right values.

    The values are checked once per process and device. ValueError names what is missing, or by how
    much the gradients disagree.
    """
    if dtype != torch.bfloat16 or hidden_size % HIDDEN_MULTIPLE:
        raise ValueError(
            f"engine 'liger' got {dtype} operands of hidden size {hidden_size}; it takes bfloat16 "
            f"and a multiple of {HIDDEN_MULTIPLE}. Use engine 'torch', which takes everything."
        )
    if not _is_hopper(device):
        raise ValueError(
            "engine 'liger' needs a GPU of compute capability 9.0 (H100, H200, GH200) and the "
            f"tensors are on {_device_name(device)}. Use engine 'torch'."
        )
    _verify(device)


@cache
def _verify(device: torch.device) -> None:
    """Compare the kernel with fp32 torch on the same bf16 operands.

    2200 rows are two full passes of the kernel and a partial one; their weights are random, and
    20 % of the targets are on another rank.
    """
    kept, hidden, vocabulary = 2200, 256, 1000
    generator = torch.Generator(device).manual_seed(0)
    rows_KH = torch.randn(kept, hidden, generator=generator, device=device).bfloat16()
    weight_VH = torch.randn(vocabulary, hidden, generator=generator, device=device) * 0.2
    weight_VH = weight_VH.bfloat16()
    column_K = torch.randint(0, vocabulary, (kept,), generator=generator, device=device)
    owned_K = torch.rand(kept, generator=generator, device=device) < 0.8
    upstream_K = torch.rand(kept, generator=generator, device=device) + 0.5
    logits_KV = rows_KH.float() @ weight_VH.float().t()
    lse_K = logits_KV.logsumexp(1)
    onehot_KV = owned_K[:, None] * F.one_hot(column_K, vocabulary)
    gradient_KV = upstream_K[:, None] * ((logits_KV - lse_K[:, None]).exp() - onehot_KV)
    d_rows, d_weight = liger_gradients(rows_KH, weight_VH, column_K, owned_K, upstream_K, lse_K)
    _compare("hidden", d_rows, gradient_KV @ weight_VH.float())
    _compare("weight", d_weight, gradient_KV.t() @ rows_KH.float())


def _compare(name: str, value: Tensor, expected: Tensor) -> None:
    """ValueError when a gradient of the kernel has another shape, or other values."""
    if value.shape != expected.shape:
        raise ValueError(
            f"engine 'liger': the installed liger-kernel returns a gradient of {name} of shape "
            f"{tuple(value.shape)}, expected {tuple(expected.shape)}. "
            "Use engine 'torch', or liger-kernel 0.8.5."
        )
    difference = ((value.float() - expected).norm() / expected.norm()).item()
    if not difference <= _TOLERANCE:  # NaN counts as a disagreement
        raise ValueError(
            f"engine 'liger': the installed liger-kernel disagrees with plain torch on this "
            f"device: gradient of {name} is off by {difference:.1e} relative, "
            f"allowed {_TOLERANCE:g}. Use engine 'torch', or liger-kernel 0.8.5."
        )


def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger's fused_scaled_cross_entropy_backward.

    Its arguments are (grad_loss [K], rows, weight, target, lse, temperature, ignore_index,
    hidden_size), and it returns (d rows, d weight).
    """
    try:
        return importlib.import_module(KERNEL_MODULE).fused_scaled_cross_entropy_backward
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"engine 'liger' needs Liger-Kernel's Hopper kernels, which cannot be loaded here "
            f"({error}); pip install 'liger-kernel[cutedsl]>=0.8.5', or use engine 'torch'."
        ) from error


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the {device.type}"
