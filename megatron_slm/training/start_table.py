"""The table at the start of a run: what runs, in which layout, which accelerations are on, and why the others are not."""

import torch

from megatron_slm import device as device_room
from megatron_slm.checkpoint.architecture import allowed_differences
from megatron_slm.config.check import tokens_per_step, train_steps
from megatron_slm.config.schema import Config
from megatron_slm.parallel import Groups
from megatron_slm.training.scorer_settings import choice_rules


def start_table(config: Config, groups: Groups, layers: str) -> dict[str, str]:
    """Rows name -> state, with the reason in brackets; `layers` is "torch" or "transformer_engine"."""
    rows = {
        "run folder": config.run.folder,
        **_origin_words(config),
        "processes": str(groups.world_size),
        "batch": f"{config.data.global_batch_size} x {config.data.sequence_length} = {tokens_per_step(config)} tokens per step, {train_steps(config)} steps",
        "selection": _selection_words(config),
        "documents": _document_words(config),
        "precision": _precision_words(config),
        **_rows_words(config),
    }
    device = device_room.Device(groups.device.type, groups.device, torch.distributed.get_backend())
    accelerations = device_room.describe_acceleration(
        device, layers, config.device, isolated_documents=config.data.document_policy == "isolated"
    )
    for feature, state, why in [*layout_rows(config, groups.dp_size), *accelerations]:
        rows[feature] = f"{state} ({why})" if why else state
    return rows


def layout_rows(config: Config, dp_size: int) -> list[tuple[str, str, str]]:
    """Rows (feature, state, why) of how the model and the batch are spread, and of what that hides or recomputes."""
    parallel = config.parallel

    def size(name: str) -> tuple[str, str, str]:
        value = getattr(parallel, name)
        return (
            (f"{name.replace('_', ' ')} parallel", str(value), "")
            if value > 1
            else (f"{name.replace('_', ' ')} parallel", "off", f"parallel.{name} is 1")
        )

    def switch(feature: str, name: str, missing: str = "") -> tuple[str, str, str]:
        return (
            (feature, "on", "")
            if getattr(parallel, name)
            else (feature, "off", missing or f"parallel.{name} is false")
        )

    copy = parallel.tensor * parallel.pipeline * parallel.context
    data = (
        ("data parallel", str(dp_size), "")
        if dp_size > 1
        else ("data parallel", "off", f"one copy of the model takes all processes, {copy}")
    )
    alone = (
        "nothing to reduce over: data parallel x context parallel is 1"
        if dp_size * parallel.context == 1
        else ""
    )
    experts = (
        [
            size("expert"),
            ("experts, tensor parallel", str(parallel.expert_tensor or parallel.tensor), ""),
        ]
        if config.model.experts
        else []
    )
    micro_batches = config.data.global_batch_size // (config.data.micro_batch_size * dp_size)
    return [
        size("tensor"),
        switch(
            "sequence parallel", "sequence", "parallel.tensor is 1" if parallel.tensor == 1 else ""
        ),
        size("pipeline"),
        size("virtual_pipeline")
        if parallel.pipeline > 1
        else ("virtual pipeline parallel", "off", "parallel.pipeline is 1"),
        size("context"),
        data,
        *experts,
        switch("distributed optimizer", "distributed_optimizer"),
        ("gradient reduction overlapped", "no effect", alone)
        if alone and parallel.overlap_grad_reduce
        else switch("gradient reduction overlapped", "overlap_grad_reduce"),
        switch("parameter gather overlapped", "overlap_param_gather"),
        (
            "gradient accumulation",
            f"{micro_batches} micro-batches of {config.data.micro_batch_size} sequences",
            "",
        ),
        ("recomputation", "off", "model.recompute is none")
        if config.model.recompute == "none"
        else (
            "recomputation",
            config.model.recompute,
            {"selective": "attention cores", "full": "every layer"}[config.model.recompute],
        ),
    ]


def _origin_words(config: Config) -> dict[str, str]:
    """Where the architecture comes from, and what is changed in it on purpose."""
    source, rows = config.model.from_checkpoint, {}
    if source:
        rows["architecture"] = f"that of {source} (model.from_checkpoint)"
    if other := allowed_differences(config):
        rows["rotary embedding"] = f"{'; '.join(other)} (checkpoint.allow_other_rope)"
    return rows


def _selection_words(config: Config) -> str:
    selection = config.selection
    if selection.scorer == "none":
        return "none: plain CLM"
    reference = selection.reference
    source = (
        f", reference {reference.checkpoint} (online)"
        if reference.checkpoint
        else f", stored scores {', '.join(reference.scores)}"
        if reference.scores
        else ""
    )
    return f"{selection.scorer}, keep {selection.keep_fraction}, scope {selection.scope}{source}"


def _rows_words(config: Config) -> dict[str, str]:
    """What the head and backward leave out, in so many words: an approximation is never silent."""
    selection, rules = config.selection, choice_rules(config.selection)
    unseen = (
        " (loss/all, loss/rejected and the excess are not logged: a static scorer never sees them)"
        if rules.scorer.is_static and rules.scorer.name != "none"
        else ""
    )
    return {
        "head": f"selected tokens only{unseen}" if rules.head_on_selected_rows else "every token",
        "backward": {
            "all": "every token in every layer",
            "last_layer": "the last layer leaves unselected tokens out (exact)",
            "every_layer_approximate": "APPROXIMATE: every layer drops the gradient of unselected tokens",
        }[selection.backward_rows],
    }


def _document_words(config: Config) -> str:
    return {
        "packed": "packed: attention runs across the documents of a sequence",
        "isolated": "isolated: no token sees another document",
    }[config.data.document_policy]


def _precision_words(config: Config) -> str:
    scale = f", loss scale {config.optimizer.initial_loss_scale:g} at first, dynamic"
    return {
        "fp32": "fp32",
        "bf16": "bf16, fp32 main weights and gradients",
        "fp16": f"fp16, fp32 main weights and gradients{scale}",
    }[config.device.precision]
