"""README.md of an export: how the model was trained, on what, and how far it came.

Everything is read from the checkpoint and from config.yaml of its run; what they do not say is left
out. The licence is the user's to state.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.folder import CheckpointInfo
from megatron_slm.config.yaml_text import read_yaml
from megatron_slm.files.plain import read_json_object

_HEAD = """---
# license: state it here; it also follows from the data and from the model this one started from
library_name: transformers
pipeline_tag: text-generation
tags:
- selective-language-modeling
---
"""
_RECIPE = (
    ("selection.scorer", "token scorer"),
    ("selection.keep_fraction", "keep fraction"),
    ("selection.scope", "tokens compete within"),
    ("selection.clm_weight", "weight of the plain loss"),
    ("data.sequence_length", "sequence length in tokens"),
    ("data.global_batch_size", "sequences per step"),
    ("data.document_policy", "documents of a sequence"),
    ("optimizer.learning_rate", "learning rate"),
    ("schedule.style", "learning-rate schedule"),
    ("schedule.warmup_fraction", "warm-up, as a fraction of the run"),
    ("optimizer.weight_decay", "weight decay"),
    ("device.precision", "precision"),
    ("run.seed", "seed"),
)
"""The settings that the card names, with the words for them."""


def model_card(checkpoint: Path, info: CheckpointInfo, name: str, class_name: str) -> str:
    """The text of README.md for an export of `checkpoint` (a step_* folder) to a folder `name`.

    class_name: of the Hugging Face model. ValueError: trainer.json is no JSON.
    """
    settings = _run_settings(checkpoint)
    trainer = read_json_object(checkpoint, "trainer.json")
    lines = [
        _HEAD,
        f"# {name}",
        "",
        f"A `{class_name}` exported by megatron-slm from step {info.step:,} of a training run.",
        *_section("Training", _training(info, trainer, settings)),
        *_section("Recipe", _recipe(settings)),
        *_section("Data", _data(info, trainer)),
        *_section("Reference model", _reference(trainer)),
        *_section("Plain loss on validation corpora, in nats per token", _losses(info)),
        *_section("Use", iter([_usage(name)]), bullet=""),
        "",
    ]
    return "\n".join(lines)


def _section(title: str, entries: Iterator[str], bullet: str = "- ") -> list[str]:
    """A heading and its entries; nothing where there are none."""
    found = [f"{bullet}{entry}" for entry in entries]
    return ["", f"## {title}", "", *found] if found else []


def _run_settings(checkpoint: Path) -> dict[str, Any]:
    """config.yaml of the checkpoint's run; empty where the checkpoint was moved elsewhere."""
    path = checkpoint.parent.parent / "config.yaml"
    settings = read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    section, _, field = name.partition(".")
    return (settings.get(section) or {}).get(field)


def _training(
    info: CheckpointInfo, trainer: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[str]:
    if start := _setting(settings, "checkpoint.initialize_from"):
        yield f"started from the weights of `{start}`"
    if source := info.extra.get("imported_from"):
        yield f"imported from the Hugging Face folder `{source}`"
    if info.tokens_processed:
        yield f"{info.tokens_processed:,} tokens processed in {info.step:,} steps"
    selected = trainer.get("tokens_selected")
    if selected and info.tokens_processed:
        share = selected / info.tokens_processed
        yield f"{selected:,.0f} of them trained on ({share:.1%})"


def _recipe(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, words in _RECIPE:
        value = _setting(settings, name)
        if value is not None:
            yield f"{words}: {_written(value)} (`{name}`)"


def _data(info: CheckpointInfo, trainer: Mapping[str, Any]) -> Iterator[str]:
    for corpus in (trainer.get("data") or {}).get("corpora") or []:
        yield f"`{Path(corpus['prefix']).name}`, {corpus['fingerprint']}"
    tokenizer = info.tokenizer
    if fingerprint := tokenizer.get("fingerprint"):
        size = tokenizer.get("vocabulary_size")  # missing where a program of others saved it
        yield f"tokenizer of {size:,} ids, {fingerprint}" if size else f"tokenizer {fingerprint}"


def _reference(trainer: Mapping[str, Any]) -> Iterator[str]:
    inputs = trainer.get("inputs") or {}
    for name, what in (
        ("selection.reference.scores", "scores"),
        ("selection.reference.checkpoint", "checkpoint"),
    ):
        for path, fingerprint in (inputs.get(name) or {}).items():
            yield f"{what} `{Path(path).name}`, {fingerprint}"


def _losses(info: CheckpointInfo) -> Iterator[str]:
    for name, loss in info.validation_loss.items():
        yield f"{name}: {loss:.4f}"


def _usage(name: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        "```"
    )


def _written(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
