"""The runner of our own models, through megatron-core, in any parallel layout."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import Module

from megatron_slm.config.sizes import sequence_pieces
from megatron_slm.data.batch import Batch, plain_batch
from megatron_slm.model.context_parallel import on_this_rank, whole_sequences
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.parallel import Groups
from megatron_slm.scoring.corpus import ReferenceRunner, TokenStream
from megatron_slm.scoring.in_step import InStep
from megatron_slm.scoring.windows import WindowPlan

MICRO_BATCHES_PER_STAGE = 8


def megatron_runner(
    models: list[Module],
    groups: Groups,
    stream: TokenStream,
    plan: WindowPlan,
    columns: tuple[str, ...],
    micro_batch_size: int,
) -> ReferenceRunner:
    """Gives losses and entropies of `models` (this rank's chunks). Every rank of a model-parallel
    group makes one and calls it alike.
    """
    extras = tuple(column for column in columns if column != "loss")

    def whole_columns(output: dict[str, Tensor]) -> dict[str, np.ndarray]:
        whole = {name: whole_sequences(output[name], groups) for name in columns}
        return {name: values.float().cpu().numpy() for name, values in whole.items()}

    def forward(batches: Sequence[Batch]) -> list[dict[str, np.ndarray]]:
        outputs = forward_losses(models, on_this_rank(batches, groups), groups, extras=extras)
        return [whole_columns(output) for output in outputs]

    in_step = InStep(groups)
    idle_BS = np.zeros((micro_batch_size, plan.window_tokens), np.int64)
    return ReferenceRunner(
        stream,
        plan,
        columns,
        micro_batch_size,
        lambda batches: in_step.run(batches, forward),
        finish=lambda: in_step.finish(plain_batch(idle_BS, idle_BS), forward),
        collects=groups.is_last_stage and groups.tp_rank == 0 and groups.cp_rank == 0,
        length_divisor=sequence_pieces(groups.tp_size, groups.cp_size),
        batches_per_call=MICRO_BATCHES_PER_STAGE * groups.pp_size,
    )
