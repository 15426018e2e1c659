"""layer_passes.swiglu as one Triton kernel forward and one backward.

Forward reads 2 F values of a row and writes F; backward reads 3 F and writes 2 F. Sums are not
needed, so a program takes a block of columns of one row.

Legend: R rows, F gated features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_slm.ops.layer_passes import contiguous_rows

__all__ = ["FusedSwiGLU"]

_BLOCK = 1024


class _SwiGLUContext(FunctionCtx):
    """What forward keeps for backward."""

    saved_tensors: tuple[Tensor, ...]


class FusedSwiGLU(torch.autograd.Function):
    """apply(gate_and_up [..., 2 F])."""

    @staticmethod
    def forward(ctx: _SwiGLUContext, gate_and_up: Tensor) -> Tensor:
        if gate_and_up.shape[-1] % 2:
            raise ValueError(
                f"gate_and_up is {tuple(gate_and_up.shape)}; its last dimension holds the gate's "
                "values and as many of up."
            )
        joint_RF2 = contiguous_rows(gate_and_up)
        features = joint_RF2.shape[1] // 2
        gated_RF = torch.empty(
            len(joint_RF2), features, dtype=gate_and_up.dtype, device=gate_and_up.device
        )
        if gated_RF.numel():
            _forward_kernel[_grid(gated_RF)](
                joint_RF2,
                gated_RF,
                features,
                joint_RF2.stride(0),
                BLOCK=_block(features),
                num_warps=4,
            )
        ctx.save_for_backward(joint_RF2)
        return gated_RF.view(*gate_and_up.shape[:-1], features)

    @staticmethod
    def backward(ctx: _SwiGLUContext, grad: Tensor) -> Tensor:
        (joint_RF2,) = ctx.saved_tensors
        grad_RF = contiguous_rows(grad)
        features = grad_RF.shape[1]
        d_joint_RF2 = torch.empty(joint_RF2.shape, dtype=joint_RF2.dtype, device=joint_RF2.device)
        if grad_RF.numel():
            _backward_kernel[_grid(grad_RF)](
                grad_RF,
                joint_RF2,
                d_joint_RF2,
                features,
                grad_RF.stride(0),
                joint_RF2.stride(0),
                BLOCK=_block(features),
                num_warps=4,
            )
        return d_joint_RF2.view(*grad.shape[:-1], 2 * features)


def _block(features: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(features))


def _grid(gated_RF: Tensor) -> tuple[int, int]:
    # Rows first: CUDA allows 2^31 programs in the first dimension and 65535 in the others.
    return len(gated_RF), triton.cdiv(gated_RF.shape[1], _block(gated_RF.shape[1]))


@triton.jit
def _forward_kernel(joint, gated, features, joint_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    place = joint + row * joint_stride + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + features, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(gated + row * features + column, y.to(gated.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, joint, d_joint, features, grad_stride, joint_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    place = joint + row * joint_stride + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + features, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # The derivative of silu: sigmoid (1 + gate (1 - sigmoid)).
    d_gate = g * up * (sigmoid + silu * (1.0 - sigmoid))
    result = d_joint + row * 2 * features + column
    tl.store(result, d_gate.to(d_joint.dtype.element_ty), mask=inside)
    tl.store(result + features, (g * silu).to(d_joint.dtype.element_ty), mask=inside)
