"""All families, and the one that a model is written as."""

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import (
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from megatron_slm.convert.families.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    ministral.FAMILY,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    smollm3.FAMILY,
    phi3.FAMILY,
    gpt_neox.FAMILY,
    gpt2.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    gemma3.FAMILY,
)
"""An export writes a model as the first of these that can express it."""
MODEL_TYPES = tuple(family.model_type for family in FAMILIES)
"""The families whose config.json can be read."""
_NOT_BUILT = {
    "gemma2": "soft caps of attention and of logits are not implemented",
    "gemma3": "it reads images too; for its language model alone make a folder of its text_config "
    "(model_type gemma3_text) and tensors",
}
"""Families that are asked for, and why they cannot be read."""
_NEAREST_SHOWN = 3


def family_of(model_type: str | None) -> Family:
    """The family of a config.json. ValueError: it is none of these."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    why = _NOT_BUILT.get(model_type or "", f"expected one of {', '.join(MODEL_TYPES)}")
    raise ValueError(
        f"this Hugging Face model cannot be expressed here: model_type {model_type!r}; {why}"
    )


def family_for(model: ModelConfig, model_type: str = "") -> Family:
    """The family that `model` is written as: it computes the same.

    model_type: the one that is wanted; "" = the first that can express the model. ValueError: there
    is none, or it cannot.
    """
    if model_type:
        family = family_of(model_type)
        if obstacles := [*family.obstacles(model)]:
            raise ValueError(f"this model is no {model_type}: {'; '.join(obstacles)}")
        return family
    for family in FAMILIES:
        if not [*family.obstacles(model)]:
            return family
    raise ValueError(_gap(model) or _nearest(model))


def _gap(model: ModelConfig) -> str:
    """A sentence for combinations of settings that no family has, with what to do; else empty."""
    if model.qk_norm and model.qkv_bias:
        return (
            "model.qk_norm together with model.qkv_bias has no Hugging Face architecture to "
            "export to; train with one of them"
        )
    if model.experts and model.qkv_bias:
        return (
            "model.qkv_bias together with model.experts has no Hugging Face architecture to "
            "export to (Qwen2-MoE also has a shared expert)"
        )
    if model.experts and not model.qk_norm and not model.renormalize_experts:
        return (
            "model.experts with renormalize_experts: false has no Hugging Face architecture to "
            "export to without model.qk_norm (Qwen3-MoE)"
        )
    if model.experts and model.full_attention_layers:
        return (
            "model.full_attention_layers together with model.experts has no Hugging Face "
            "architecture to export to (in Mixtral and Qwen3-MoE all layers have the window)"
        )
    return ""


def _nearest(model: ModelConfig) -> str:
    """A sentence with the families that lack the fewest of the model's settings."""
    obstacles = {family.model_type: [*family.obstacles(model)] for family in FAMILIES}
    nearest = sorted(obstacles.values(), key=len)[:_NEAREST_SHOWN]
    return (
        "these settings together have no Hugging Face architecture to export to; nearest: "
        + "; ".join(" and ".join(reasons) for reasons in nearest)
    )
