"""A frozen reference model beside the model in training.

It has the same parallel layout and its own (the same or a smaller) architecture.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_slm.checkpoint.folder import CheckpointInfo, read_checkpoint_info
from megatron_slm.config.schema import Config

if TYPE_CHECKING:
    from megatron_slm.model.build import MegatronModule
    from megatron_slm.parallel import Groups


def reference_config(config: Config, info: CheckpointInfo) -> Config:
    """What the frozen reference is built from: its own model in the run's layout, never in fp8, and
    without what only a backward or experts need.
    """
    model = info.reference_model()
    parallel = config.parallel
    if not model.experts:
        parallel = dataclasses.replace(parallel, expert=1, expert_tensor=0)
    return dataclasses.replace(
        config,
        model=model,
        parallel=parallel,
        device=dataclasses.replace(config.device, fp8="none", head_engine="torch"),
    )


def load_reference(config: Config, groups: Groups) -> list[MegatronModule] | None:
    """The online reference's model chunks; None when the config names none.

    They are in eval mode without gradients and never in fp8, which would move the choice.
    setup.open_run_inputs has seen that its tokenizer is the run's and that it fits the layout.
    """
    from megatron_slm.checkpoint.weights import load_weights
    from megatron_slm.model.build import build_model

    checkpoint = config.selection.reference.checkpoint
    if checkpoint is None:
        return None
    info = read_checkpoint_info(checkpoint)
    reference = build_model(
        reference_config(config, info), info.model["vocabulary_size"], groups, trainable=False
    )
    load_weights(reference, checkpoint, groups)
    return reference
