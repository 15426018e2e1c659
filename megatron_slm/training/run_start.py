"""What happens before the first step of a run: models, checkpoint store and weights are made, and
settings and versions are written into its folder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from megatron_slm.checkpoint.folder import complete_checkpoints
from megatron_slm.checkpoint.retention import Retention
from megatron_slm.checkpoint.store import CheckpointStore
from megatron_slm.checkpoint.weights import load_weights
from megatron_slm.config.load import to_yaml
from megatron_slm.config.schema import Config
from megatron_slm.model.build import build_model
from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
from megatron_slm.monitoring import wandb_run_id
from megatron_slm.parallel import Groups
from megatron_slm.training import resume, setup
from megatron_slm.training.outside_parts import OutsideParts
from megatron_slm.training.reference import load_reference
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.saved_state import restore
from megatron_slm.training.token_selector import TokenSelector
from megatron_slm.training.trainer import Trainer
from megatron_slm.training.versions import changed_files, write_versions

Messages = list[tuple[str, str]]
"""(text, level) of messages that are reported once the sinks are open."""


def make_trainer(
    config: Config, groups: Groups, run_inputs: setup.RunInputs, parts: OutsideParts
) -> Trainer:
    """Models with fresh weights, their optimizer, the token selector and an online reference."""
    models = wrap_data_parallel(build_model(config, run_inputs.vocabulary_size, groups), config)
    selector = TokenSelector(
        config.selection,
        groups,
        sequence_length=config.data.sequence_length,
        corpora=len(run_inputs.corpora),
    )
    optimizer = build_optimizer(models, config, parts.make_optimizer)
    return Trainer(models, optimizer, selector, groups, load_reference(config, groups))


def make_store(run: RunParts, report: Callable[[str, str], None]) -> CheckpointStore:
    """The run folder's checkpoints; damaged ones are passed to `report`."""
    kept = run.config.checkpoint
    retention = Retention(
        kept.keep_last,
        kept.keep_every_steps,
        kept.keep_best,
        kept.best_validation or next(iter(run.validation), ""),
    )
    return CheckpointStore(
        run.folder, run.groups, retention=retention, asynchronous=kept.asynchronous, report=report
    )


def take_weights(run: RunParts) -> tuple[bool, Messages]:
    """Resume from the newest good checkpoint, or take the configured initial weights; returns
    (whether the run is resumed, messages about it).
    """
    state = run.store.load_latest(run.trainer.models, run.trainer.optimizer)
    if state is not None:
        return True, restore(run, state)
    if complete_checkpoints(run.store.checkpoints):
        raise ValueError(
            f"{run.store.checkpoints}: every checkpoint is damaged; move them away to start anew, "
            "or restore one from a backup"
        )
    initial = run.config.checkpoint.initialize_from
    if not initial:
        return False, []
    info = load_weights(run.trainer.models, initial, run.groups)
    run.trainer.optimizer.reload_model_params()
    return False, [(f"weights of {initial}, step {info.step}", "info")]


def write_settings(run: RunParts, *, resumed: bool) -> Messages:
    """Write config.yaml and versions.txt, by rank 0; what has changed since the start before.

    Every rank gets the changes, because another rank than 0 writes the log.
    """
    changes: list[Messages] = [[]]
    if run.groups.world_rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        if resumed:
            changes = [resume.changed_settings(run.folder, run.config) + changed_files(run.folder)]
        (run.folder / "config.yaml").write_text(to_yaml(run.config))
        write_versions(run.folder)
    dist.broadcast_object_list(changes, src=0)
    return changes[0]


def agreed_wandb_id(run: RunParts) -> str:
    """The id of the W&B run, as rank 0 has it."""
    ids = [""]
    if run.groups.world_rank == 0:
        ids = [wandb_run_id(run.folder, run.wandb_id or None)]
    dist.broadcast_object_list(ids, src=0)
    return ids[0]
