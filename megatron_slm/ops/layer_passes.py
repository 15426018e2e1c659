"""What a decoder layer does between its products: RMSNorm, SwiGLU and rotary embedding.

Each is one pass over memory forward and one backward on a GPU with Triton (rms_norm_triton.py,
swiglu_triton.py, rotary_triton.py), and plain torch elsewhere; the functions named `plain_*` are
the specification of both. All arithmetic is fp32 with one rounding to the dtype of the result,
whatever the dtype of the operands.

RMSNorm, bytes of memory traffic per bf16 value     here      on fp32 copies
forward                                             4         20
backward                                            6         24 or more
saved for backward                                  2         4

Legend: S tokens of a sequence on this rank, B sequences, H hidden, F gated features on this rank,
G key/value groups, J query heads of a group, N = G J query heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.ops import head_plan

WIDEST_NORM = 32768
"""Values of one row that the norm's kernel holds in registers; longer rows take plain torch."""


def runs_fused(tensor: Tensor) -> bool:
    """Whether the functions of this file run as one Triton pass on this tensor."""
    return tensor.device.type == "cuda" and head_plan.has_triton()


def contiguous_rows(tensor: Tensor) -> Tensor:
    """[rows, last dimension] with contiguous rows; a view where the other dimensions allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rms_norm(hidden: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + epsilon) * weight over the last dimension (Zhang and Sennrich,
    arXiv 1910.07467).

    hidden [..., H] and the result are fp32, bf16 or fp16; rows may be any distance apart. Backward
    keeps `hidden` and one fp32 per row. The weight's gradient is summed in fp32 in an order that
    depends on the shape alone, and then rounded once to the weight's dtype.
    """
    if runs_fused(hidden) and hidden.shape[-1] <= WIDEST_NORM:
        from megatron_slm.ops.rms_norm_triton import FusedRMSNorm

        return FusedRMSNorm.apply(hidden, weight_H, epsilon)
    return plain_rms_norm(hidden, weight_H, epsilon)


def plain_rms_norm(hidden: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """rms_norm by torch.nn.functional.rms_norm on fp32 copies."""
    normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), weight_H.float(), epsilon)
    return normed.to(hidden.dtype)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202).

    gate_and_up [..., 2 F] holds the gate's F values and then up's; fp32, bf16 or fp16. The result
    is [..., F] of the same dtype. Backward keeps gate_and_up alone.
    """
    if runs_fused(gate_and_up):
        from megatron_slm.ops.swiglu_triton import FusedSwiGLU

        return FusedSwiGLU.apply(gate_and_up)
    return plain_swiglu(gate_and_up)


def plain_swiglu(gate_and_up: Tensor) -> Tensor:
    """swiglu in plain torch, on fp32 copies."""
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_and_up.dtype)


def rotary(
    query_SBND: Tensor, key_SBGD: Tensor, cosine_SP: Tensor, sine_SP: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions (Su et al., arXiv 2104.09864), both in one pass.

    The halves x and y of every head (P = D / 2 values each) become x cos - y sin and y cos + x sin,
    Llama's order. cosine and sine are fp32, row s is that of the token at place s of this rank.
    The results are contiguous; backward keeps cosine and sine alone. ValueError when the shapes do
    not fit.
    """
    _check_table(key_SBGD, cosine_SP, sine_SP)
    if runs_fused(query_SBND):
        from megatron_slm.ops.rotary_triton import FusedRotary

        return FusedRotary.apply(query_SBND, key_SBGD, cosine_SP, sine_SP)
    return plain_rotary(query_SBND, key_SBGD, cosine_SP, sine_SP)


def plain_rotary(
    query_SBND: Tensor, key_SBGD: Tensor, cosine_SP: Tensor, sine_SP: Tensor
) -> tuple[Tensor, Tensor]:
    """rotary in plain torch."""
    return _turned(query_SBND, cosine_SP, sine_SP), _turned(key_SBGD, cosine_SP, sine_SP)


def split_rotary(
    mixed_SBGW: Tensor, cosine_SP: Tensor, sine_SP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(query_SBND, key_SBGD, value_SBGD) of the joint product, queries and keys turned as by
    `rotary`.

    mixed_SBGW holds W = (J + 2) D values per group: J query heads, a key and a value, the order of
    megatron-core's linear_qkv. All three results are contiguous copies: mixed_SBGW can be freed,
    where a view of its values would keep all of it until backward. Backward writes the gradient of
    mixed_SBGW in one pass.
    """
    head_size = 2 * cosine_SP.shape[-1]
    if mixed_SBGW.shape[-1] % head_size or mixed_SBGW.shape[-1] < 3 * head_size:
        raise ValueError(
            f"the joint product has {mixed_SBGW.shape[-1]} values per group and the rotary tables "
            f"are of head size {head_size}; a group must be a whole number of heads, at least 3."
        )
    _check_table(mixed_SBGW[..., :head_size], cosine_SP, sine_SP)
    if runs_fused(mixed_SBGW):
        from megatron_slm.ops.rotary_triton import FusedSplitRotary

        return FusedSplitRotary.apply(mixed_SBGW, cosine_SP, sine_SP)
    return plain_split_rotary(mixed_SBGW, cosine_SP, sine_SP)


def plain_split_rotary(
    mixed_SBGW: Tensor, cosine_SP: Tensor, sine_SP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """split_rotary in plain torch."""
    heads_SBGKD = mixed_SBGW.unflatten(-1, (-1, 2 * cosine_SP.shape[-1]))
    query_SBND = heads_SBGKD[:, :, :, :-2].flatten(2, 3)
    key_SBGD, value_SBGD = heads_SBGKD[:, :, :, -2], heads_SBGKD[:, :, :, -1]
    query_SBND, key_SBGD = plain_rotary(query_SBND, key_SBGD, cosine_SP, sine_SP)
    return query_SBND, key_SBGD, value_SBGD.contiguous()


def _turned(heads_SBND: Tensor, cosine_SP: Tensor, sine_SP: Tensor) -> Tensor:
    cosine_S11P, sine_S11P = cosine_SP[:, None, None], sine_SP[:, None, None]
    x, y = heads_SBND.float().chunk(2, dim=-1)
    turned = torch.cat((x * cosine_S11P - y * sine_S11P, y * cosine_S11P + x * sine_S11P), dim=-1)
    return turned.to(heads_SBND.dtype)


def _check_table(heads_SBGD: Tensor, cosine_SP: Tensor, sine_SP: Tensor) -> None:
    expected = (heads_SBGD.shape[0], heads_SBGD.shape[-1] // 2)
    for name, table in (("cosine", cosine_SP), ("sine", sine_SP)):
        if tuple(table.shape) != expected or table.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tuple(table.shape)} {table.dtype}; heads of "
                f"{tuple(heads_SBGD.shape)} need {expected} torch.float32: a row per token and "
                "half of the head size, all of which is turned."
            )
