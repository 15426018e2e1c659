"""Splits batches over the context-parallel ranks, and gathers outputs into whole sequences.

B: sequences of a micro-batch, S: their tokens on this context-parallel rank, T: whole sequences.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_slm.data.batch import Batch, slice_for_context_parallel
from megatron_slm.parallel import Groups


def on_this_rank(batches: Sequence[Batch], groups: Groups) -> list[Batch]:
    """Micro-batches cut to this context-parallel rank and moved to its device."""
    return [
        slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size).to(groups.device)
        for batch in batches
    ]


def whole_sequences(value_BS: torch.Tensor, groups: Groups) -> torch.Tensor:
    """value_BT: all context-parallel ranks' values, their head and tail chunks put back in order.

    docs/method.md#point-15
    """
    if groups.cp_size == 1:
        return value_BS
    value_BS = value_BS.contiguous()
    parts = [torch.empty_like(value_BS) for _ in range(groups.cp_size)]
    dist.all_gather(parts, value_BS, group=groups.cp)
    heads, tails = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
    return torch.cat([*heads, *reversed(tails)], dim=1)
