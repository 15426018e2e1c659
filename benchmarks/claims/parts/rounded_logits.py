"""Logits rounded to bf16, as in a framework whose head writes its product in bf16.

The library has no such setting: its products of bf16 operands are summed and kept in fp32. An
experiment names this file as its arm's `after_step`; loading it replaces the product by which the
head makes logits, in the process of that run alone. Losses, the choice made from them, gradients
and validation all come from the rounded logits then.

Equals, in plain torch: F.cross_entropy((hidden @ weight.T).bfloat16().float(), target).
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from megatron_slm.ops.matmul import logits_into

HEADS = ("head_forward", "head_backward", "selected_linear_cross_entropy")
"""Modules of megatron_slm.ops that make logits: losses, logits made again in backward, and selected
rows only."""


def rounded_logits_into(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """out = hidden @ weight.T, rounded to bf16 and held in fp32."""
    logits_into(out_CV, hidden_CH, weight_VH)
    return out_CV.copy_(out_CV.bfloat16())


for name in HEADS:
    head: Any = import_module(f"megatron_slm.ops.{name}")
    assert head.logits_into is logits_into
    head.logits_into = rounded_logits_into


def after_step(step: int, metrics: Mapping[str, Any]) -> None:
    """The hook by which a run is given this file; there is nothing to do in it."""
