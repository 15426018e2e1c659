"""One call of the head: everything about it that is not a tensor, and the checks at its door."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.ops.head_plan import HeadPlan
from megatron_slm.ops.vocab_parallel import VocabularyShard

EXTRAS = ("entropy", "sum_squared_probability", "target_rank")


@dataclass(frozen=True)
class HeadCall:
    """Everything about one call that is not a tensor."""

    shard: VocabularyShard
    plan: HeadPlan
    ignore_index: int
    z_loss: float
    sequence_parallel: bool
    accumulate_into_main_grad: bool
    extras: tuple[str, ...]


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """[start, stop) in slices of at most `size`."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def logit_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [rows, columns]; each row starts at a multiple of 64 values.

    megatron-core pads vocabularies for this alignment, which fast product kernels ask for.
    The padding is never computed, but it is zeroed: some kernels read it and multiply it by
    zero (torch's bf16 product on CPUs with AMX does), and zero times a NaN left in memory is NaN.
    """
    storage = like.new_empty((rows, -(-columns // 64) * 64), dtype=dtype)
    storage[:, columns:].zero_()
    return storage[:, :columns]


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabularyShard,
    *,
    ignore_index: int,
    sharded_rows: bool,
    extras: tuple[str, ...],
    accumulate_into_main_grad: bool,
) -> None:
    rows = list(hidden.shape[:-1])
    if sharded_rows and rows:
        rows[0] *= shard.ranks
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected [..., H] and [vocabulary, H] with the same H."
        )
    if list(target.shape) != rows:
        gathered = (
            f" (sequence parallel: {shard.ranks} x the first dimension)" if sharded_rows else ""
        )
        raise ValueError(
            f"target is {tuple(target.shape)}; for hidden {tuple(hidden.shape)} it must be {tuple(rows)}{gathered}."
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target is {target.dtype}; token ids must be int64.")
    if hidden.dtype != weight.dtype or hidden.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be the same of float32, bfloat16, float16."
        )
    if unknown := set(extras) - set(EXTRAS):
        raise ValueError(f"unknown extras {sorted(unknown)}; choose from {', '.join(EXTRAS)}.")
    if accumulate_into_main_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError(
            "accumulate_into_main_grad is on but weight has no main_grad buffer; wrap the model in megatron-core's DistributedDataParallel, "
            "or turn it off."
        )
    if target.device.type == "cpu" and target.numel():
        wrong = target[
            (target != ignore_index) & ((target < 0) | (target >= shard.vocabulary_size))
        ]
        if len(wrong):
            raise ValueError(
                f"target holds id {wrong[0].item()}; ids must be in [0, {shard.vocabulary_size}) or {ignore_index} (ignored)."
            )
