"""A runner that runs our own model through megatron-core, in any parallel layout."""

import numpy as np
import torch
import torch.distributed as dist

from megatron_slm.data.batch import Batch, slice_for_context_parallel
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.parallel import Groups
from megatron_slm.scoring.corpus import ReferenceRunner, TokenStream
from megatron_slm.scoring.windows import WindowPlan

MICRO_BATCHES_PER_STAGE = 8


def megatron_runner(
    models: list,
    groups: Groups,
    stream: TokenStream,
    plan: WindowPlan,
    columns: tuple[str, ...],
    micro_batch_size: int,
) -> ReferenceRunner:
    """Losses and entropies of `models` (this rank's chunks). Every rank of a model-parallel group makes one and calls it alike."""
    extras = tuple(column for column in columns if column != "loss")

    def forward(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
        local = [
            slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size).to(groups.device)
            for batch in batches
        ]
        outputs = forward_losses(models, local, groups, extras=extras)
        return [
            {column: whole_sequences(output[column], groups) for column in columns}
            for output in outputs
        ]

    divided = groups.tp_size * groups.cp_size > 1
    return ReferenceRunner(
        stream,
        plan,
        columns,
        micro_batch_size,
        forward,
        collects=groups.is_last_stage and groups.tp_rank == 0 and groups.cp_rank == 0,
        length_divisor=2 * groups.tp_size * groups.cp_size if divided else 1,
        batches_per_call=MICRO_BATCHES_PER_STAGE * groups.pp_size,
    )


def whole_sequences(value_BS: torch.Tensor, groups: Groups) -> np.ndarray:
    """The [B, S] values of all context-parallel ranks, head-tail chunks put back in order.

    docs/method.md#point-15
    """
    size = groups.cp_size
    if size > 1:
        parts = [torch.empty_like(value_BS) for _ in range(size)]
        dist.all_gather(parts, value_BS.contiguous(), group=groups.cp)
        heads, tails = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        value_BS = torch.cat([*heads, *reversed(tails)], dim=1)
    return value_BS.float().cpu().numpy()
