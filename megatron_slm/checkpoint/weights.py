"""The weights of a model's chunks: described for a save or a load, and loaded without anything
else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch.nn import Module

from megatron_slm.checkpoint.agreement import damaged_files_of
from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    read_checkpoint_info,
    resolve_checkpoint,
)
from megatron_slm.checkpoint.loading import load_state
from megatron_slm.parallel import Groups

Models = Sequence[Module]
"""A rank's chunks of a model, bare or wrapped for data parallelism."""


def load_weights(models: Models, checkpoint: str | Path, groups: Groups) -> CheckpointInfo:
    """Load weights only, from a run folder or a checkpoint of any layout.

    Its files are checked first: ValueError when one is damaged.
    """
    folder = resolve_checkpoint(checkpoint)
    if damaged := damaged_files_of(folder):
        raise ValueError(
            f"{folder}: damaged ({', '.join(damaged)}: missing, no plain file, or content that "
            "differs from checksums.json); use another checkpoint or copy it again"
        )
    take_weights(models, load_state(sharded_weights(models), folder, groups))
    return read_checkpoint_info(folder)


def sharded_weights(models: Models) -> dict[str, Any]:
    """The weights of a model's chunks as a sharded state dict."""
    chunks = enumerate(unwrap_model(list(models)))
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in chunks}


def take_weights(models: Models, loaded: dict[str, Any]) -> None:
    """Copy what was loaded for `sharded_weights` into the chunks."""
    for number, chunk in enumerate(unwrap_model(list(models))):
        chunk.load_state_dict(loaded[f"model{number}"], strict=True)


def finish_overlapped_gather(models: Models) -> None:
    """Bring every rank's weights up to date: with overlap_param_gather, those that other ranks have
    updated arrive only in the next forward pass.
    """
    for model in models:
        if isinstance(model, DistributedDataParallel) and model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
