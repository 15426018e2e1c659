"""The table at the start of a run: what runs, in which layout, and with which accelerations.

Whatever is off has its reason beside it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_slm.checkpoint.architecture import allowed_differences
from megatron_slm.config.layer_engine import torch_only_settings
from megatron_slm.config.schema import Config
from megatron_slm.device import Device
from megatron_slm.monitoring.console import short_number
from megatron_slm.parallel import Groups
from megatron_slm.planning.parameters import parameters_of_model
from megatron_slm.planning.wording import backward_rows_on_a_gpu
from megatron_slm.training.acceleration_rows import Row, acceleration_rows
from megatron_slm.training.layout_rows import layout_rows
from megatron_slm.training.run_length import RunLength
from megatron_slm.training.scorer_settings import choice_rules
from megatron_slm.training.setup import RunInputs

BACKWARD_ROWS = {
    "all": "every token in every layer",
    "last_layer": "the last layer leaves unselected tokens out (exact)",
    "every_layer_approximate": "APPROXIMATE: every layer drops the gradient of unselected tokens",
}
CORPORA_SHOWN = 4
"""A blend of more corpora is shown by the least and the most often read one."""


@dataclass(frozen=True)
class StartTable:
    """What is shown when a run starts, and the whole of it for its folder."""

    facts: dict[str, str]
    """Rows that are always shown."""
    layout: list[Row]
    """How model and batch are spread."""
    accelerations: list[Row]
    """What the device can do, and why it cannot do the rest."""
    on_gpu: bool

    def full(self) -> dict[str, str]:
        """Every row with its reason."""
        return self.facts | _described([*self.layout, *self.accelerations])

    def short(self, full_at: Path) -> dict[str, str]:
        """The rows of what is on, and one row with the names of all that is off.

        That row names the file with the reasons. On a GPU an acceleration that is off keeps its
        row, because the user can do something about the lost speed.
        """
        shown: list[Row] = []
        names_of_off: list[str] = []
        for row in [*self.layout, *self.accelerations]:
            feature, state, _ = row
            may_fold = row in self.layout or not self.on_gpu
            if state in ("off", "absent") and may_fold:
                names_of_off.append(feature)
            else:
                shown.append(row)
        rows = self.facts | _described(shown)
        if names_of_off:
            rows["off"] = f"{_joined(names_of_off)} (why: {full_at})"
        return rows


def start_table(
    config: Config,
    groups: Groups,
    run_inputs: RunInputs,
    layers: str,
    wandb: str,
    length: RunLength,
) -> StartTable:
    """What a run shows when it starts.

    layers: torch or transformer_engine. wandb: where the Weights & Biases run is.
    """
    facts = {
        "run folder": config.run.folder,
        "W&B": wandb,
        **_describe_origin(config),
        "model": _describe_model(config, run_inputs.vocabulary_size),
        "processes": str(groups.world_size),
        "batch": _describe_batch(config, length),
        "data": describe_data(
            config,
            [(each.prefix, each.manifest.tokens) for each in run_inputs.corpora],
            length.tokens,
        ),
        "selection": _describe_selection(config),
        "documents": _describe_documents(config),
        "precision": _describe_precision(config),
        **_describe_rows(config, on_gpu=groups.device.type == "cuda"),
    }
    device = Device(groups.device.type, groups.device, torch.distributed.get_backend())
    accelerations = acceleration_rows(
        device,
        layers,
        config.device,
        engine_lacks="; ".join(each.why for each in torch_only_settings(config)),
        optimizer=config.optimizer.kind,
        model=config.model,
    )
    layout = layout_rows(config, groups.dp_size, on_gpu=device.kind == "cuda")
    return StartTable(facts, layout, accelerations, on_gpu=device.kind == "cuda")


def _described(rows: list[Row]) -> dict[str, str]:
    return {feature: f"{state} ({why})" if why else state for feature, state, why in rows}


def _joined(features: list[str]) -> str:
    """tensor parallel, pipeline parallel, fp8 -> tensor and pipeline parallel, fp8"""
    parallel = [name.removesuffix(" parallel") for name in features if name.endswith(" parallel")]
    others = [name for name in features if not name.endswith(" parallel")]
    if len(parallel) > 1:
        parallel = [*parallel[:-2], f"{parallel[-2]} and {parallel[-1]}"]
    together = [f"{', '.join(parallel)} parallel"] if parallel else []
    return ", ".join(together + others)


def _describe_model(config: Config, vocabulary_size: int) -> str:
    total = parameters_of_model(config, vocabulary_size).total
    return (
        f"{short_number(total)} parameters, {config.model.layers} layers, "
        f"vocabulary of {vocabulary_size:,}"
    )


def describe_data(config: Config, corpora: list[tuple[str, int]], run_tokens: int) -> str:
    """How often the whole run passes over each training corpus.

    corpora: (prefix, tokens) in the order of data.train.
    """
    weights = config.data.weights or [tokens for _, tokens in corpora]
    passes = [
        (run_tokens * weight / sum(weights) / max(1, tokens), prefix, tokens)
        for (prefix, tokens), weight in zip(corpora, weights, strict=True)
    ]
    shown = passes if len(passes) <= CORPORA_SHOWN else [min(passes), max(passes)]
    epochs = [
        f"{count:.3g} epochs of {prefix} ({short_number(tokens)} tokens)"
        for count, prefix, tokens in shown
    ]
    if len(passes) > CORPORA_SHOWN:
        described = f"{len(passes)} corpora, from {' to '.join(epochs)}"
    else:
        described = ", ".join(epochs)
    return f"{short_number(run_tokens)} tokens: {described}"


def _describe_batch(config: Config, length: RunLength) -> str:
    sizes = f"{config.data.global_batch_size} x {config.data.sequence_length}"
    done = f", {length.start.steps} of them done" if length.start.steps else ""
    return f"{sizes} = {length.step_tokens} tokens per step, {length.steps} steps{done}"


def _describe_origin(config: Config) -> dict[str, str]:
    """The source of the architecture, and which of its settings are overridden."""
    rows = {}
    if source := config.model.from_checkpoint:
        rows["architecture"] = f"that of {source} (model.from_checkpoint)"
    if other := allowed_differences(config):
        rows["rotary embedding"] = f"{'; '.join(other)} (checkpoint.allow_other_rope)"
    return rows


def _describe_selection(config: Config) -> str:
    selection = config.selection
    if selection.scorer == "none":
        return "none: plain CLM"
    reference = selection.reference
    source = ""
    if reference.checkpoint:
        source = f", reference {reference.checkpoint} (online)"
    elif reference.scores:
        source = f", stored scores {', '.join(reference.scores)}"
    end = ", until the reference is overtaken" if selection.end_when_overtaken else ""
    choice = f"{selection.scorer}, keep {selection.keep_fraction}, scope {selection.scope}"
    return f"{choice}{source}{end}"


def _describe_rows(config: Config, on_gpu: bool) -> dict[str, str]:
    """What the head and backward leave out; an approximation is always named.

    On a GPU it is said where that does not pay, as far as it was measured.
    """
    rules = choice_rules(config.selection)
    head = "every token"
    if rules.head_on_selected_rows:
        head = "selected tokens only"
        if rules.scorer.is_static and rules.scorer.name != "none":
            head += (
                " (loss/all, loss/rejected and the excess are not logged: a static scorer never "
                "sees them)"
            )
    backward = BACKWARD_ROWS[config.selection.backward_rows]
    if on_gpu and (pays := backward_rows_on_a_gpu(config)):
        backward += f"; {pays}"
    return {"head": head, "backward": backward}


def _describe_documents(config: Config) -> str:
    return {
        "packed": "packed: attention runs across the documents of a sequence",
        "isolated": "isolated: no token sees another document",
    }[config.data.document_policy]


def _describe_precision(config: Config) -> str:
    scale = f", loss scale {config.optimizer.initial_loss_scale:g} at first, dynamic"
    return {
        "fp32": "fp32",
        "bf16": "bf16, fp32 main weights and gradients",
        "fp16": f"fp16, fp32 main weights and gradients{scale}",
    }[config.device.precision]
