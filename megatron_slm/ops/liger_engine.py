"""Liger-Kernel's Hopper kernel as the backward of the head, on the kept rows only. Optional; used when asked for.

    pip install 'liger-kernel[cutedsl]>=0.8.5'      # written against 0.8.5

Its backward makes the logit gradients and both products in one persistent kernel, 1024 rows at a time, without logits in memory. It knows
no selection: it is handed the kept rows, their log-sum-exp and their incoming gradient, and so computes those rows only. Its forward is not
used: that stages logits in fp16 on the way to the softmax, and the losses that decide the selection are fp32 sums here, whatever the engine.

What it does less exactly than the torch engine: the weight's gradient is rounded to bf16 after every 1024 kept rows. What it cannot do:
anything but bf16 on compute capability 9.0 with H a multiple of 64, and z-loss. All of that is an error, never a silent change of engine.

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
"""No column, and not Liger's ignore_index either: the row keeps its softmax gradient, and no column gets a target's."""
_IGNORE_INDEX = -100
_TOLERANCE = 1e-2
"""Gradients differ by bf16 roundings of logit gradients and results (0.2 % each); a wrong formula is off by far more."""


def liger_gradients(
    rows_KH: Tensor,
    weight_VH: Tensor,
    column_K: Tensor,
    owned_K: Tensor,
    upstream_K: Tensor,
    lse_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d rows [K, H], d weight [V, H]), bf16: p @ weight and p.T @ rows, with p = upstream * (exp(rows @ weight.T - lse) - onehot(column)).

    The one-hot is left out where `owned_K` is False (another tensor rank has the target). lse_K is that of the whole vocabulary.
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
    """Return when the engine can run these operands on this device and agrees with plain torch there (tried once per process).

    ValueError says what is missing, or by how much the gradients disagree.
    """
    if dtype != torch.bfloat16 or hidden_size % HIDDEN_MULTIPLE:
        raise ValueError(
            f"engine 'liger' got {dtype} operands of hidden size {hidden_size}; it takes bfloat16 and a multiple of {HIDDEN_MULTIPLE}. "
            "Use engine 'torch', which takes everything."
        )
    if not _is_hopper(device):
        raise ValueError(
            f"engine 'liger' needs a GPU of compute capability 9.0 (H100, H200, GH200) and the tensors are on {_describe(device)}. "
            "Use engine 'torch'."
        )
    _verify(device)


@cache
def _verify(device: torch.device) -> None:
    """Two waves of kept rows, a ragged third, weighted, some targets foreign: against fp32 torch on the same bf16 operands."""
    kept, hidden, vocabulary = 2200, 256, 1000
    generator = torch.Generator(device).manual_seed(0)
    rows_KH = torch.randn(kept, hidden, generator=generator, device=device).bfloat16()
    weight_VH = (
        torch.randn(vocabulary, hidden, generator=generator, device=device) * 0.2
    ).bfloat16()
    column_K = torch.randint(0, vocabulary, (kept,), generator=generator, device=device)
    owned_K = torch.rand(kept, generator=generator, device=device) < 0.8
    upstream_K = torch.rand(kept, generator=generator, device=device) + 0.5
    logits_KV = rows_KH.float() @ weight_VH.float().t()
    lse_K = logits_KV.logsumexp(1)
    gradient_KV = upstream_K[:, None] * (
        (logits_KV - lse_K[:, None]).exp() - owned_K[:, None] * F.one_hot(column_K, vocabulary)
    )
    expected = (gradient_KV @ weight_VH.float(), gradient_KV.t() @ rows_KH.float())
    for name, value, reference in zip(
        ("hidden", "weight"),
        liger_gradients(rows_KH, weight_VH, column_K, owned_K, upstream_K, lse_K),
        expected,
        strict=True,
    ):
        if value.shape != reference.shape:
            raise ValueError(
                f"engine 'liger': the installed liger-kernel returns a gradient of {name} of shape {tuple(value.shape)}, expected "
                f"{tuple(reference.shape)}. Use engine 'torch', or liger-kernel 0.8.5."
            )
        difference = ((value.float() - reference).norm() / reference.norm()).item()
        if not difference <= _TOLERANCE:  # a NaN is a disagreement too
            raise ValueError(
                f"engine 'liger': the installed liger-kernel disagrees with plain torch on this device: gradient of {name} is off by "
                f"{difference:.1e} relative, allowed {_TOLERANCE:g}. Use engine 'torch', or liger-kernel 0.8.5."
            )


def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """(grad_loss [K], rows, weight, target, lse, temperature, ignore_index, hidden_size) -> (d rows, d weight)."""
    try:
        return importlib.import_module(KERNEL_MODULE).fused_scaled_cross_entropy_backward
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"engine 'liger' needs Liger-Kernel's Hopper kernels, which cannot be loaded here ({error}); "
            "pip install 'liger-kernel[cutedsl]>=0.8.5', or use engine 'torch'."
        ) from error


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _describe(device: torch.device) -> str:
    return (
        f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"the {device.type}"
    )
