"""GPT-NeoX: Pythia and GPT-NeoX-20B. LayerNorm, biases, a rotary embedding of a part of each head,
attention and feed-forward layer beside each other.

Its query_key_value holds query, key and value of one head after the other, which is our order too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.architecture import ROPE
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import activations, biases, plain_heads
from megatron_slm.convert.families.family import COMMON_KEYS, SIZES, Family
from megatron_slm.convert.families.rope import (
    key_number_problems,
    longest_position,
    rope_of,
    rope_problems,
    rope_scaling,
    rope_settings,
)
from megatron_slm.convert.table import Row, Table, module_rows
from megatron_slm.convert.tensors import LAYER
from megatron_slm.convert.transforms import VOCABULARY

KEYS = COMMON_KEYS | {
    "layer_norm_eps",
    "use_parallel_residual",
    "attention_bias",
    "rotary_pct",
    "rotary_emb_base",
    "rope_parameters",
    "rope_scaling",
    "hidden_dropout",  # of training, as attention_dropout
    "classifier_dropout",
}
_THEIRS = "gpt_neox.layers.{layer}."


TABLE: Table = (
    Row("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",), VOCABULARY),
    *module_rows(LAYER + "input_layernorm", _THEIRS + "input_layernorm"),
    *module_rows(LAYER + "self_attention.linear_qkv", _THEIRS + "attention.query_key_value"),
    *module_rows(LAYER + "self_attention.linear_proj", _THEIRS + "attention.dense"),
    *module_rows(LAYER + "pre_mlp_layernorm", _THEIRS + "post_attention_layernorm"),
    *module_rows(LAYER + "mlp.linear_fc1", _THEIRS + "mlp.dense_h_to_4h"),
    *module_rows(LAYER + "mlp.linear_fc2", _THEIRS + "mlp.dense_4h_to_h"),
    *module_rows("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
    Row("output_layer.weight", ("embed_out.weight",), VOCABULARY),
)


def _file_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """transformers 4 names the base rotary_emb_base and the turned part rotary_pct."""
    own = {"rope_theta": config.get("rotary_emb_base")}
    if wrong := [*key_number_problems(config), *rope_problems({**config, **own}, partial=True)]:
        yield from wrong
        return
    parts = {config["rotary_pct"]} if config.get("rotary_pct") is not None else set()
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, Mapping) and rope.get("partial_rotary_factor") is not None:
            parts.add(rope["partial_rotary_factor"])
    if len(parts) > 1:
        yield (
            f"the turned part of a head is given as {' and as '.join(map(str, sorted(parts)))} "
            "(rotary_pct, partial_rotary_factor): keep one of them"
        )


def _settings(theirs: Any) -> dict[str, Any]:
    rope = rope_of(theirs)
    return {
        "layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "ffn_hidden_size": theirs.intermediate_size,
        "attention_heads": theirs.num_attention_heads,
        "vocabulary_size": theirs.vocab_size,
        "activation": activations.OURS[theirs.hidden_act],
        "norm_epsilon": theirs.layer_norm_eps,
        "parallel_residual": theirs.use_parallel_residual,
        "tied_embeddings": theirs.tie_word_embeddings,
        "initialization_std": theirs.initializer_range,
        "rope_fraction": float(rope.get("partial_rotary_factor", 1.0)),
        **biases.attention_settings(theirs),
        **rope_settings(rope),
    }


def _problems(theirs: Any) -> Iterator[str]:
    yield from activations.activation_problems("hidden_act", theirs.hidden_act)


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    return {
        "vocab_size": model.vocabulary_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.attention_heads,
        "hidden_act": activations.THEIRS[model.activation],
        "max_position_embeddings": longest_position(model, sequence_length),
        "layer_norm_eps": model.norm_epsilon,
        "initializer_range": model.initialization_std,
        "tie_word_embeddings": model.tied_embeddings,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.qkv_bias,
        "rotary_pct": model.rope_fraction,
        "rotary_emb_base": model.rope_base,
        "rope_scaling": rope_scaling(model),
        "attention_dropout": model.dropout,
        "hidden_dropout": model.dropout,
    }


def _lacks(model: ModelConfig) -> Iterator[str]:
    yield from plain_heads.other_heads(model)
    yield from biases.one_bias_in_attention(model)


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    keys=KEYS,
    table=TABLE,
    free=SIZES
    | {
        *ROPE,
        *biases.ATTENTION,
        "rope_fraction",
        "activation",
        "parallel_residual",
    },
    fixed={
        "normalization": "layernorm",
        "gated_feed_forward": False,
        "feed_forward_bias": True,
    },
    settings=_settings,
    config=_config,
    file_problems=_file_problems,
    problems=_problems,
    lacks=_lacks,
    # Older files hold the causal mask and the number that it writes.
    derived=r".*\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))",
)
