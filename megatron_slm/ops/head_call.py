"""The arguments of one call of the head beside its tensors, and the checks of all its arguments.

Legend: C rows of a chunk, H hidden, V vocabulary columns of this tensor rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.ops.head_plan import HeadPlan
from megatron_slm.ops.known_rows import KnownRows
from megatron_slm.ops.liger_engine import check_liger
from megatron_slm.ops.vocab_parallel import VocabularyShard

EXTRAS = ("entropy", "sum_squared_probability", "target_rank")
"""What forward can give beside the loss: the entropy of the softmax in nats; the sum of its squared
probabilities; and the target's rank (int64; 0 = the most likely token, -1 = ignored), which takes
one more collective over the tensor ranks."""


@dataclass(frozen=True)
class HeadCall:
    """The arguments of one call beside its tensors."""

    shard: VocabularyShard
    plan: HeadPlan
    ignore_index: int
    z_loss: float
    sequence_parallel: bool
    """Hidden rows are sharded over several tensor ranks."""
    accumulate_into_main_grad: bool
    extras: tuple[str, ...] = ()
    known_rows: KnownRows | None = None

    def rows_of(self, value_N: Tensor) -> Tensor:
        """The rows to compute: those whose gradient or weight is not 0, or the known ones."""
        return (self.known_rows or KnownRows()).index(value_N)

    def check(self, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
        """ValueError when the tensors do not fit each other or these settings."""
        self._check_shapes(hidden, weight, target)
        if target.dtype != torch.int64:
            raise ValueError(f"target is {target.dtype}; token ids must be int64.")
        accepted = (torch.float32, torch.bfloat16, torch.float16)
        if hidden.dtype != weight.dtype or hidden.dtype not in accepted:
            raise ValueError(
                f"hidden is {hidden.dtype} and weight {weight.dtype}; "
                "both must be the same of float32, bfloat16, float16."
            )
        if unknown := set(self.extras) - set(EXTRAS):
            raise ValueError(f"unknown extras {sorted(unknown)}; choose from {', '.join(EXTRAS)}.")
        if self.accumulate_into_main_grad and getattr(weight, "main_grad", None) is None:
            raise ValueError(
                "accumulate_into_main_grad is on but weight has no main_grad buffer; wrap the "
                "model in megatron-core's DistributedDataParallel, or turn it off."
            )
        if target.device.type == "cpu":  # on a GPU, looking at the ids would stall the stream
            self._check_ids(target)
        if self.plan.engine == "liger":
            check_liger(hidden.dtype, hidden.device, hidden.shape[-1])
            if self.z_loss:
                raise ValueError(
                    f"z_loss is {self.z_loss} with engine 'liger', whose kernel has none; "
                    "use engine 'torch', or z_loss 0."
                )

    def _check_shapes(self, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
        rows = list(hidden.shape[:-1])
        if self.sequence_parallel and rows:
            rows[0] *= self.shard.ranks
        if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
                "expected [..., H] and [vocabulary, H] with the same H."
            )
        if list(target.shape) != rows:
            gathered = ""
            if self.sequence_parallel:
                gathered = f" (sequence parallel: {self.shard.ranks} x the first dimension)"
            raise ValueError(
                f"target is {tuple(target.shape)}; "
                f"for hidden {tuple(hidden.shape)} it must be {tuple(rows)}{gathered}."
            )

    def _check_ids(self, target: Tensor) -> None:
        outside = (target < 0) | (target >= self.shard.vocabulary_size)
        wrong = target[(target != self.ignore_index) & outside]
        if len(wrong):
            raise ValueError(
                f"target holds id {wrong[0].item()}; ids must be in "
                f"[0, {self.shard.vocabulary_size}) or {self.ignore_index} (ignored)."
            )


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


def target_logits(logits_CV: Tensor, column_C: Tensor, owned_C: Tensor) -> Tensor:
    """The logit of each row's target; 0 where another rank has the target."""
    return logits_CV.gather(1, column_C[:, None]).squeeze(1).masked_fill(~owned_C, 0.0)
