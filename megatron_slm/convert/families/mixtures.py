"""Mixtures of experts, between config.json and our settings."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import EXPERTS
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.table import Row, Table
from megatron_slm.convert.tensors import EXPERT, LAYER
from megatron_slm.convert.transforms import GATE_UP

KEYS = frozenset(("num_experts", "num_local_experts", "num_experts_per_tok"))
"""Version 5 of transformers has two names for the number of experts."""
FREE = frozenset(("experts", *EXPERTS))


def mixture_rows(router: str, expert: str, gate_up: tuple[str, str], down: str) -> Table:
    """The rows of a family: the router, and each expert as a feed-forward layer of its own.

    The names are whole, with {layer} and {expert} in them; `expert` is what an expert's begin with.
    """
    return (
        Row(LAYER + "mlp.router.weight", (router,)),
        Row(EXPERT + "linear_fc1.weight", tuple(expert + name for name in gate_up), GATE_UP),
        Row(EXPERT + "linear_fc2.weight", (expert + down,)),
    )


def expert_problems(theirs: Any, experts: int, *, sum_to_one: bool) -> Iterator[str]:
    """Numbers of experts that are none, and a router that could not be trained."""
    if experts < 1:
        yield f"{experts} experts (num_experts, num_local_experts); expected at least 1"
    if theirs.num_experts_per_tok == 1 and sum_to_one:
        yield (
            "num_experts_per_tok 1 with weights that sum to 1: the one expert's weight would "
            "always be 1 and the router would learn nothing"
        )


def is_a_mixture(model: ModelConfig) -> Iterator[str]:
    """A phrase where `model` has no experts."""
    if not model.experts:
        yield "model.experts is 0"
