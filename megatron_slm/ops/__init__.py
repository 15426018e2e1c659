"""Fused operations: the head, and what layers do between their products (layer_passes.py).

Imports torch only; process groups are arguments.
"""

from megatron_slm.ops.head_plan import HeadPlan, plan_head
from megatron_slm.ops.known_rows import KnownRows
from megatron_slm.ops.linear_cross_entropy import linear_cross_entropy
from megatron_slm.ops.selected_linear_cross_entropy import selected_linear_cross_entropy

__all__ = [
    "HeadPlan",
    "KnownRows",
    "linear_cross_entropy",
    "plan_head",
    "selected_linear_cross_entropy",
]
