"""What most families share: the keys of config.json, the settings and the tensor names of Llama."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import ROPE
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.family import COMMON_KEYS, SIZES
from megatron_slm.convert.families.rope import (
    ROPE_KEYS,
    longest_position,
    rope_of,
    rope_scaling,
    rope_settings,
)
from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.table import Row, Table
from megatron_slm.convert.tensors import LAYER
from megatron_slm.convert.transforms import GATE_UP, QKV, VOCABULARY

KEYS = COMMON_KEYS | {"num_key_value_heads", "head_dim", "rms_norm_eps", *ROPE_KEYS}
FREE = SIZES | {*ROPE}
_THEIRS = "model.layers.{layer}."


def attention_names(suffix: str, parts: str = "qkv") -> tuple[str, ...]:
    """Llama's names of the tensors of the attention: `suffix` behind each of `parts`."""
    return tuple(f"{_THEIRS}self_attn.{part}_{suffix}" for part in parts)


TABLE: Table = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCABULARY),
    Row(LAYER + "input_layernorm.weight", (_THEIRS + "input_layernorm.weight",)),
    Row(LAYER + "self_attention.linear_qkv.weight", attention_names("proj.weight"), QKV),
    Row(LAYER + "self_attention.linear_qkv.bias", attention_names("proj.bias"), QKV),
    Row(LAYER + "self_attention.q_layernorm.weight", attention_names("norm.weight", "q")),
    Row(LAYER + "self_attention.k_layernorm.weight", attention_names("norm.weight", "k")),
    Row(LAYER + "self_attention.linear_proj.weight", attention_names("proj.weight", "o")),
    Row(LAYER + "self_attention.linear_proj.bias", attention_names("proj.bias", "o")),
    Row(LAYER + "pre_mlp_layernorm.weight", (_THEIRS + "post_attention_layernorm.weight",)),
    Row(
        LAYER + "mlp.linear_fc1.weight",
        (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
        GATE_UP,
    ),
    Row(
        LAYER + "mlp.linear_fc1.bias",
        (_THEIRS + "mlp.gate_proj.bias", _THEIRS + "mlp.up_proj.bias"),
        GATE_UP,
    ),
    Row(LAYER + "mlp.linear_fc2.weight", (_THEIRS + "mlp.down_proj.weight",)),
    Row(LAYER + "mlp.linear_fc2.bias", (_THEIRS + "mlp.down_proj.bias",)),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("output_layer.weight", ("lm_head.weight",), VOCABULARY),
)


def size_settings(theirs: Any) -> dict[str, Any]:
    """The sizes of the network, and how its weights are begun."""
    head_size = getattr(theirs, "head_dim", None)
    return {
        "layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "ffn_hidden_size": theirs.intermediate_size,
        "attention_heads": theirs.num_attention_heads,
        "query_groups": theirs.num_key_value_heads or theirs.num_attention_heads,
        "head_size": head_size or theirs.hidden_size // theirs.num_attention_heads,
        "vocabulary_size": theirs.vocab_size,
        "tied_embeddings": theirs.tie_word_embeddings,
        "initialization_std": theirs.initializer_range,
    }


def settings(theirs: Any) -> dict[str, Any]:
    """The fields of ModelConfig that a Llama has."""
    return size_settings(theirs) | {
        "norm_epsilon": theirs.rms_norm_eps,
        **rope_settings(rope_of(theirs)),
    }


def problems(theirs: Any) -> Iterator[str]:
    """What the decoder here does not have, of values whose default a family's class decides."""
    if theirs.hidden_act not in ("silu", "swish"):
        yield f"hidden_act {theirs.hidden_act!r}; expected silu (or its other name, swish)"


def size_keys(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """config.json's keys of the sizes, and of how weights are begun."""
    geometry = Geometry.from_model(model)
    return {
        "vocab_size": geometry.vocabulary_size,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.ffn_hidden_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.groups,
        "head_dim": geometry.head_size,
        "max_position_embeddings": sequence_length,
        "attention_dropout": model.dropout,
        "initializer_range": model.initialization_std,
        "tie_word_embeddings": geometry.tied,
    }


def config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """config.json's keys that a Llama's share with those of other families."""
    return size_keys(model, sequence_length) | {
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "max_position_embeddings": longest_position(model, sequence_length),
        "rope_theta": model.rope_base,
        "rope_scaling": rope_scaling(model),
    }
