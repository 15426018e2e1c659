"""The table at the start of a run: what runs, in which layout, which accelerations are on, and why
the others are not.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_slm.checkpoint.architecture import allowed_differences
from megatron_slm.config.schema import Config
from megatron_slm.device import Device
from megatron_slm.monitoring.console import short_number
from megatron_slm.parallel import Groups
from megatron_slm.planning.parameters import parameters_of_model
from megatron_slm.training.acceleration_rows import acceleration_rows
from megatron_slm.training.run_length import RunLength
from megatron_slm.training.scorer_settings import choice_rules
from megatron_slm.training.setup import RunInputs

CORPORA_SHOWN = 4
"""A blend of more corpora is shown by the least and the most often read one."""


@dataclass(frozen=True)
class StartTable:
    """What is shown when a run starts, and the whole of it for its folder."""

    facts: dict[str, str]
    """Rows that are always shown."""
    layout: list[tuple[str, str, str]]
    """Rows (feature, state, why): how model and batch are spread."""
    accelerations: list[tuple[str, str, str]]
    """Rows (feature, state, why): what the device can do, and why it cannot do the rest."""
    on_gpu: bool

    def full(self) -> dict[str, str]:
        """Every row with its reason."""
        return self.facts | _in_words([*self.layout, *self.accelerations])

    def short(self, full_at: Path) -> dict[str, str]:
        """The rows of what is on; the names of all that is off in one row that says where the
        reasons stand.

        On a GPU an acceleration that is off keeps its row: there it is a loss of speed that
        somebody can do something about.
        """
        kept, off = [], []
        for row in [*self.layout, *self.accelerations]:
            may_fold = row in self.layout or not self.on_gpu
            is_off = row[1] in ("off", "absent")
            (off if is_off and may_fold else kept).append(row)
        rows = self.facts | _in_words(kept)
        if off:
            rows["off"] = f"{_joined([name for name, *_ in off])} (why: {full_at})"
        return rows


def start_table(
    config: Config,
    groups: Groups,
    run_inputs: RunInputs,
    layers: str,
    wandb: str,
    length: RunLength,
) -> StartTable:
    """`layers` is "torch" or "transformer_engine"; `wandb` says where the Weights & Biases run is."""
    facts = {
        "run folder": config.run.folder,
        "W&B": wandb,
        **_origin_words(config),
        "model": _model_words(config, run_inputs.vocabulary_size),
        "processes": str(groups.world_size),
        "batch": f"{config.data.global_batch_size} x {config.data.sequence_length} = {length.step_tokens} tokens per step, {_steps_words(length)}",
        "data": describe_data(
            config,
            [(each.prefix, each.manifest.tokens) for each in run_inputs.corpora],
            length.tokens,
        ),
        "selection": _selection_words(config),
        "documents": _document_words(config),
        "precision": _precision_words(config),
        **_rows_words(config),
    }
    device = Device(groups.device.type, groups.device, torch.distributed.get_backend())
    accelerations = acceleration_rows(
        device, layers, config.device, isolated_documents=config.data.document_policy == "isolated"
    )
    layout = layout_rows(config, groups.dp_size)
    return StartTable(facts, layout, accelerations, on_gpu=device.kind == "cuda")


def _in_words(rows: list[tuple[str, str, str]]) -> dict[str, str]:
    return {feature: f"{state} ({why})" if why else state for feature, state, why in rows}


def _joined(features: list[str]) -> str:
    """tensor parallel, pipeline parallel, fp8 -> tensor and pipeline parallel, fp8"""
    parallel = [name.removesuffix(" parallel") for name in features if name.endswith(" parallel")]
    others = [name for name in features if not name.endswith(" parallel")]
    if len(parallel) > 1:
        parallel = [*parallel[:-2], f"{parallel[-2]} and {parallel[-1]}"]
    words = [f"{', '.join(parallel)} parallel"] if parallel else []
    return ", ".join(words + others)


def _model_words(config: Config, vocabulary_size: int) -> str:
    total = parameters_of_model(config, vocabulary_size).total
    return f"{short_number(total)} parameters, {config.model.layers} layers, vocabulary of {vocabulary_size:,}"


def describe_data(config: Config, corpora: list[tuple[str, int]], run_tokens: int) -> str:
    """How often the whole run passes over each training corpus. corpora: (prefix, tokens) in the
    order of data.train.
    """
    weights = config.data.weights or [tokens for _, tokens in corpora]
    passes = [
        (run_tokens * weight / sum(weights) / max(1, tokens), prefix, tokens)
        for (prefix, tokens), weight in zip(corpora, weights, strict=True)
    ]
    lead, between = "", ", "
    if len(passes) > CORPORA_SHOWN:
        lead, between = f"{len(passes)} corpora, from ", " to "
        passes = [min(passes), max(passes)]
    each = [
        f"{count:.3g} epochs of {prefix} ({short_number(tokens)} tokens)"
        for count, prefix, tokens in passes
    ]
    return f"{short_number(run_tokens)} tokens: {lead}{between.join(each)}"


def _steps_words(length: RunLength) -> str:
    done = length.start.steps
    return f"{length.steps} steps, {done} of them done" if done else f"{length.steps} steps"


def layout_rows(config: Config, dp_size: int) -> list[tuple[str, str, str]]:
    """Rows (feature, state, why) of how the model and the batch are spread, and of what that hides
    or recomputes.
    """
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
