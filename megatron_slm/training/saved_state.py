"""What a run puts into a checkpoint beside its weights, and takes out of it again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_slm.checkpoint.folder import CheckpointInfo, describe_model, step_folder
from megatron_slm.checkpoint.store import trainer_state
from megatron_slm.data.blend import samples_by_corpus
from megatron_slm.data.manifest import tokenizer_of
from megatron_slm.model.optimizer import load_loss_scaler_state, loss_scaler_state
from megatron_slm.selection.alarms import selection_had_ended
from megatron_slm.training import resume, setup
from megatron_slm.training.run_parts import RunParts


def save(run: RunParts, with_optimizer: bool) -> None:
    """Begin the checkpoint of the run's present step; every rank calls it."""
    config = run.config
    optimizer = run.trainer.optimizer
    tokenizer = tokenizer_of([corpus.manifest for corpus in run.run_inputs.corpora])
    trainer_fields, validation_loss = _from_last_stage(run)
    info = CheckpointInfo(
        describe_model(config.model, run.run_inputs.vocabulary_size),
        config.data.sequence_length,
        {**tokenizer, "path": str(Path(config.data.tokenizer).resolve())},
        run.step,
        run.done.tokens,
        precision=config.device.precision,
        validation_loss=validation_loss,
    )
    saved_optimizer = optimizer if with_optimizer else None
    state = trainer_state(
        saved_optimizer,
        run.groups,
        loss_scaler=loss_scaler_state(optimizer),
        skipped_steps=run.skipped_steps,
        step=run.step,
        samples=run.done.samples,
        step_tokens=run.length.step_tokens,
        data=replace(run.position, samples=run.loader.consumed_samples).to_json(),
        inputs=run.fingerprints,
        wandb_id=run.wandb_id,
        **trainer_fields,
    )
    run.store.save(run.trainer.models, saved_optimizer, info, state)


def _from_last_stage(run: RunParts) -> tuple[dict[str, Any], dict[str, float]]:
    """(fields of trainer.json, validation losses of this step).

    Metric sums and losses live on the last pipeline stage, but rank 0 writes the JSON files, so
    they are broadcast.
    """
    validated_step, losses = run.validated
    shared: list[dict[str, Any]] = [
        {
            "metrics": run.metrics.state_dict(run.groups.dp_cp),
            "tokens_selected": run.tokens_selected,
            "selection": run.trainer.selector.state_dict(),
            "probe": run.probe.state_dict(),
            "loss_spikes": run.loss_spikes.state_dict(),
        },
        losses if validated_step == run.step else {},
    ]
    dist.broadcast_object_list(shared, src=run.groups.world_size - 1)
    trainer_fields, validation_loss = shared
    return trainer_fields, validation_loss


def restore(run: RunParts, state: dict) -> list[tuple[str, str]]:
    """Put the run where the loaded checkpoint stands, whose trainer.json is `state`; returns
    messages about changes.

    ConfigError or RunInputError when it cannot go on from there: before the processes joined only
    the newest checkpoint was compared, and it may have been damaged.
    """
    assert run.store.saved_step is not None  # a checkpoint has been loaded
    saved = resume.read_saved(step_folder(run.store.checkpoints, run.store.saved_step))
    setup.check_resume(run.config, run.run_inputs, saved)
    wanted = run.position
    before = resume.position_before(saved, wanted)
    run.done = saved.done
    run.position = before.moved_to(
        wanted, partial(samples_by_corpus, index_cache=setup.index_cache(run.config))
    )
    # Loss scaling and the alarm of spikes are younger than the oldest checkpoints.
    load_loss_scaler_state(run.trainer.optimizer, state.get("loss_scaler", {}))
    run.skipped_steps = state.get("skipped_steps", 0)
    run.trainer.selector.load_state_dict(state["selection"])
    messages = _selection_that_ended(run, state["selection"].get("ended_at_tokens"))
    if run.groups.is_last_stage:
        run.tokens_selected = state["tokens_selected"]
        if before.changes(wanted):  # corpora have other ids, the probe other sequences
            state["metrics"]["sums"].pop("selection/by_corpus", None)
        else:
            run.probe.load_state_dict(state["probe"])
        run.metrics.load_state_dict(state["metrics"])
        run.loss_spikes.load_state_dict(state.get("loss_spikes", {}))
    run.wandb_id = state["wandb_id"]
    return messages + resume.notes(saved, run.config, wanted, run.fingerprints)


def _selection_that_ended(run: RunParts, tokens: int | None) -> list[tuple[str, str]]:
    """End the selection as before, and say so; tokens: when it ended, None = it had not."""
    if tokens is None or not run.config.selection.end_when_overtaken:
        return []
    run.trainer.end_selection(tokens)
    return [(selection_had_ended(tokens), "warning")]
