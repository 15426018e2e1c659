"""Which settings determine the meaning of a model's weights, and where two models differ in them.

No other file decides this. Weights of a checkpoint may load without any error into a model of
another architecture: in part (an unused bias is ignored, tied embeddings take one of two matrices),
or completely, to compute something else (another rotary base).
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_slm.config.schema import ModelConfig

ROPE_SCALING = {
    "none": (),
    "linear": ("rope_scaling_factor",),
    "llama3": (
        "rope_scaling_factor",
        "rope_original_sequence_length",
        "rope_low_frequency_factor",
        "rope_high_frequency_factor",
    ),
    "yarn": (
        "rope_scaling_factor",
        "rope_original_sequence_length",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_attention_factor",
    ),
    "dynamic": ("rope_scaling_factor", "rope_original_sequence_length"),
    "longrope": (
        "rope_scaling_factor",
        "rope_original_sequence_length",
        "rope_attention_factor",
        "rope_short_factors",
        "rope_long_factors",
    ),
}
"""The fields that each kind of scaling reads."""
ROPE_BY_LENGTH = ("dynamic", "longrope")
"""The kinds that depend on the length of the sequences."""
ROPE_WITH_ATTENTION_FACTOR = ("yarn", "longrope")
"""The kinds that also multiply rotated queries and rotated keys by rope_attention_factor."""
ROPE_NUMBERS = tuple(dict.fromkeys(chain.from_iterable(ROPE_SCALING.values())))
ROPE = ("rope_base", "rope_scaling", *ROPE_NUMBERS)
ROPE_FOR_LONGER_SEQUENCES = (*ROPE, "rope_base_windowed")
"""What changes where longer sequences are learned from a checkpoint on. Stretching the layers
without a window alone, as OLMo 3 does, begins with a base of their own for the others."""
_ROPE_OF_LAYERS = ("rope_fraction", "rope_base_windowed", "layers_without_rope")
EXPERTS = ("experts_per_token", "renormalize_experts")
"""The fields that a mixture of experts reads, beside the number of experts."""
WINDOWS = ("attention_window_tokens", "full_attention_layers")
ARCHITECTURE = (
    "layers",
    "hidden_size",
    "ffn_hidden_size",
    "activation",
    "gated_feed_forward",
    "attention_heads",
    "query_groups",
    "head_size",
    "attention_scale_size",
    "vocabulary_size",
    *WINDOWS,
    "rope_base_windowed",
    "position_embedding",
    "learned_positions",
    *ROPE,
    "rope_fraction",
    "layers_without_rope",
    "normalization",
    "norm_epsilon",
    "parallel_residual",
    "tied_embeddings",
    "embedding_scale",
    "norm_placement",
    "zero_centered_norms",
    "qkv_bias",
    "attention_output_bias",
    "feed_forward_bias",
    "qk_norm",
    "qk_norm_over",
    "experts",
    *EXPERTS,
)
"""Shape, presence and meaning of the weights: only the checkpoint's values are right for them."""
RUN_CHOICES = (
    "from_checkpoint",
    "pad_vocabulary_to_multiple_of",
    "load_balancing",
    "load_balancing_coefficient",
    "router_z_loss_coefficient",
    "initialization_std",
    "dropout",
    "recompute",
)
"""How weights are begun, padded and trained: free to differ between a checkpoint and a run that
starts from it. Rows of padding are in no loss: with another padding the rows both have are loaded.
"""


def has_auxiliary_losses(model: ModelConfig) -> bool:
    """Whether the routers add losses of their own, whose scale in backward is a step's divisor."""
    coefficients = (model.load_balancing_coefficient, model.router_z_loss_coefficient)
    return model.experts > 0 and any(coefficients)


@dataclass(frozen=True)
class Difference:
    """One architecture field with two values, defaults resolved."""

    field: str
    checkpoint: Any
    configuration: Any


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The architecture fields that have an effect in `model`, with every "0 = default" resolved.

    Only vocabulary_size stays as it is: what 0 means there, a tokenizer decides.
    """
    unused = {*ROPE_NUMBERS} - {*ROPE_SCALING[model.rope_scaling]}
    rope = model.position_embedding == "rope"
    unused |= {"learned_positions"} if rope else {*ROPE, *_ROPE_OF_LAYERS}
    if not model.experts:
        unused |= {*EXPERTS}
    if not model.attention_window_tokens:
        unused |= {"full_attention_layers", "rope_base_windowed"}
    if not model.qk_norm:
        unused.add("qk_norm_over")
    return {name: value for name, value in _resolved(model).items() if name not in unused}


def _resolved(model: ModelConfig) -> dict[str, Any]:
    values = {name: getattr(model, name) for name in ARCHITECTURE}
    values["query_groups"] = model.query_groups or model.attention_heads
    values["full_attention_layers"] = sorted(model.full_attention_layers)
    values["layers_without_rope"] = sorted(model.layers_without_rope)
    values["head_size"] = model.head_size or model.hidden_size // max(1, model.attention_heads)
    if model.attention_scale_size == values["head_size"]:
        values["attention_scale_size"] = 0.0
    if model.rope_scaling == "none" and model.rope_base_windowed == model.rope_base:
        values["rope_base_windowed"] = 0.0  # windowed layers differ in nothing
    return values


def architecture_differences(
    checkpoint: ModelConfig, configuration: ModelConfig
) -> list[Difference]:
    """Every field that has to change for `configuration` to be the model of `checkpoint`.

    Fields that have no effect in the checkpoint's model (experts_per_token of a dense one) are left
    out, and so is what follows from another field on both sides.
    """
    theirs, ours = architecture(checkpoint), _resolved(configuration)
    derived = {
        name
        for name in ("query_groups", "head_size")
        if not getattr(checkpoint, name) and not getattr(configuration, name)
    }  # both follow from fields that are compared themselves
    return [
        Difference(name, value, ours[name])
        for name, value in theirs.items()
        if ours[name] != value and name not in derived
    ]


def written(value: Any) -> str:
    """A value as YAML has it: true, 10000.0, none."""
    return str(value).lower() if isinstance(value, bool) else str(value)
