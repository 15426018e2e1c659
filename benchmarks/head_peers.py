"""The contenders of the head benchmark: different heads for the same problem.

All return the same: (loss, d hidden, d weight).

Legend: N tokens, H hidden, V vocabulary.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Unavailable
from megatron_slm.accelerations import has_module
from megatron_slm.ops import linear_cross_entropy, selected_linear_cross_entropy

Side = Callable[[], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Problem:
    """Random operands and the mask of kept tokens.

    With main_grad the weight's gradient is added to an fp32 buffer beside the weight, as megatron-
    core trains: ours adds its products there itself, the peer as megatron-core's output layer does
    (with its fused product where apex's extension is built; else it makes the gradient in the
    weight's dtype, which is then added). The buffer is part of the operands.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    target_N: Tensor
    mask_N: Tensor
    main_grad: bool = False

    @classmethod
    def make(
        cls,
        tokens: int,
        hidden: int,
        vocabulary: int,
        dtype: str,
        keep_fraction: float,
        device: torch.device,
        main_grad: bool = False,
    ) -> "Problem":
        generator = torch.Generator(device).manual_seed(0)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        hidden_NH = torch.randn(tokens, hidden, generator=generator, device=device)
        weight_VH = torch.randn(vocabulary, hidden, generator=generator, device=device)
        weight_VH = weight_VH * hidden**-0.5
        target_N = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
        order_N = torch.randperm(tokens, generator=generator, device=device)
        mask_N = (order_N < round(keep_fraction * tokens)).float()
        weight_VH = weight_VH.to(kind).requires_grad_()
        if main_grad:
            weight_VH = torch.nn.Parameter(weight_VH.detach())
            weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
            weight_VH.grad_added_to_main_grad = False
        return cls(hidden_NH.to(kind).requires_grad_(), weight_VH, target_N, mask_N, main_grad)

    @property
    def weight_gradient_bytes(self) -> int:
        """What every side must hold in the end, in the parameters' dtype; main_grad is there
        before."""
        return 0 if self.main_grad else self.weight_VH.numel() * self.weight_VH.element_size()

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """fp64; small problems only."""
        operands = [
            tensor.detach().double().requires_grad_() for tensor in (self.hidden_NH, self.weight_VH)
        ]
        loss_N = F.cross_entropy(operands[0] @ operands[1].t(), self.target_N, reduction="none")
        return loss_N.detach(), *torch.autograd.grad((loss_N * self.mask_N).sum(), operands)

    def differentiate(self, total: Tensor, loss_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.main_grad:
            return loss_N.detach(), *torch.autograd.grad(total, (self.hidden_NH, self.weight_VH))
        weight = self.weight_VH
        weight.main_grad.zero_()
        weight.grad_added_to_main_grad = False
        total.backward()
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        d_hidden_NH, self.hidden_NH.grad, weight.grad = self.hidden_NH.grad, None, None
        return loss_N.detach(), d_hidden_NH, weight.main_grad


def contenders(
    problem: Problem,
    ours: str,
    peer: str,
    chunk_tokens: int | None = None,
    elementwise: str = "auto",
) -> tuple[Side, Side]:
    """(ours, peer) as functions of no argument."""
    return _ours(problem, ours, chunk_tokens, elementwise), _peer(problem, peer)


def _ours(problem: Problem, mode: str, chunk_tokens: int | None, elementwise: str) -> Side:
    options = dict(
        chunk_tokens=chunk_tokens,
        elementwise=elementwise,
        accumulate_into_main_grad=problem.main_grad,
    )
    how = dict(engine="liger") if mode == "liger" else dict(mode=mode)
    if mode == "liger" and not has_module("cutlass"):
        raise Unavailable("Liger's kernels need pip install 'liger-kernel[cutedsl]>=0.8.5'")

    def after_the_losses():
        loss_N = linear_cross_entropy(
            problem.hidden_NH, problem.weight_VH, problem.target_N, **how, **options
        )
        return problem.differentiate((loss_N * problem.mask_N).sum(), loss_N)

    def known_before():
        total, loss_N = selected_linear_cross_entropy(
            problem.hidden_NH, problem.weight_VH, problem.target_N, problem.mask_N, **options
        )
        return problem.differentiate(total, loss_N)

    return known_before if mode == "known" else after_the_losses


def _peer(problem: Problem, name: str) -> Side:
    if name == "torch-lce":
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(
                f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has); "
                "choose another --peer"
            )

        def torch_head():
            loss_N = F.linear_cross_entropy(
                problem.hidden_NH, problem.weight_VH, problem.target_N, reduction="none"
            )
            return problem.differentiate((loss_N.float() * problem.mask_N).sum(), loss_N)

        return torch_head
    if name == "liger":
        try:
            from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
                LigerFusedLinearScaledCrossEntropyFunction as liger,
            )
        except ImportError:
            raise Unavailable(
                "peer liger needs pip install 'liger-kernel[cutedsl]>=0.8.5'; choose another --peer"
            ) from None

        def liger_head():
            loss_N = liger.apply(problem.hidden_NH, problem.weight_VH, problem.target_N)
            return problem.differentiate((loss_N * problem.mask_N).sum(), loss_N)

        return liger_head
    cross_entropy = megatron_cross_entropy(name == "megatron-fused")
    logits_of = _megatron_logits if problem.main_grad else lambda h, w: h @ w.t()

    def megatron_head():
        hidden, weight = problem.hidden_NH, problem.weight_VH
        if name == "megatron-widened":
            hidden, weight = hidden.float(), weight.float()
        logits_NV = logits_of(hidden, weight)
        loss_N = cross_entropy(logits_NV[:, None], problem.target_N[:, None])[:, 0]
        return problem.differentiate((loss_N * problem.mask_N).sum(), loss_N)

    return megatron_head


def _megatron_logits(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """The product of megatron-core's output layer, which knows main_grad."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import linear_with_grad_accumulation_and_async_allreduce

    return linear_with_grad_accumulation_and_async_allreduce(
        hidden_NH,
        weight_VH,
        None,
        has_module("fused_weight_gradient_mlp_cuda"),
        False,
        False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )


@cache
def megatron_cross_entropy(fused: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """megatron-core's loss needs its groups: a single process is one."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
    group = parallel_state.get_tensor_model_parallel_group()
    if not fused:
        return vocab_parallel_cross_entropy
    return lambda logits, target: fused_vocab_parallel_cross_entropy(logits, target, group)
