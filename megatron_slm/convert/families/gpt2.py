"""GPT-2: LayerNorm, biases, a table of learned positions.

Its Conv1D modules store matrices [inputs, outputs], and c_attn all queries, then all keys, then all
values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import activations, plain_heads
from megatron_slm.convert.families.family import SIZES, Family
from megatron_slm.convert.table import Row, Table, module_rows
from megatron_slm.convert.tensors import LAYER
from megatron_slm.convert.transforms import (
    QKV_STACKED,
    SAME,
    VOCABULARY,
    Transform,
    transposed,
)

KEYS = frozenset(
    (
        "model_type",
        "vocab_size",
        "n_embd",
        "n_inner",
        "n_layer",
        "n_head",
        "n_positions",
        "n_ctx",  # n_positions of old files, which nobody reads
        "activation_function",
        "layer_norm_epsilon",
        "initializer_range",
        "tie_word_embeddings",
        "eos_token_id",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",  # changes the rounding of scores in half precision only
        "attn_pdrop",  # of training, as the two below
        "embd_pdrop",
        "resid_pdrop",
        "summary_activation",  # of a classifier, as those below
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    )
)
_BODY = "transformer."
_THEIRS = _BODY + "h.{layer}."


def _conv1d(ours: str, theirs: str, transform: Transform = SAME) -> tuple[Row, Row]:
    return (
        Row(f"{ours}.weight", (f"{theirs}.weight",), transposed(transform)),
        Row(f"{ours}.bias", (f"{theirs}.bias",), transform),
    )


TABLE: Table = (
    Row("embedding.word_embeddings.weight", (_BODY + "wte.weight",), VOCABULARY),
    Row("embedding.position_embeddings.weight", (_BODY + "wpe.weight",)),
    *module_rows(LAYER + "input_layernorm", _THEIRS + "ln_1"),
    *_conv1d(LAYER + "self_attention.linear_qkv", _THEIRS + "attn.c_attn", QKV_STACKED),
    *_conv1d(LAYER + "self_attention.linear_proj", _THEIRS + "attn.c_proj"),
    *module_rows(LAYER + "pre_mlp_layernorm", _THEIRS + "ln_2"),
    *_conv1d(LAYER + "mlp.linear_fc1", _THEIRS + "mlp.c_fc"),
    *_conv1d(LAYER + "mlp.linear_fc2", _THEIRS + "mlp.c_proj"),
    *module_rows("decoder.final_layernorm", _BODY + "ln_f"),
    Row("output_layer.weight", ("lm_head.weight",), VOCABULARY),
)


def _with_body(name: str) -> str:
    """The published files are of the body alone: wte.weight for transformer.wte.weight."""
    return name if name.startswith((_BODY, "lm_head.")) else _BODY + name


def _nothing_in_the_file(_: Mapping[str, Any]) -> Iterator[str]:
    return iter(())  # no rotary embedding, whose keys are unknown ones here


def _settings(theirs: Any) -> dict[str, Any]:
    return {
        "layers": theirs.n_layer,
        "hidden_size": theirs.n_embd,
        "ffn_hidden_size": theirs.n_inner or 4 * theirs.n_embd,
        "attention_heads": theirs.n_head,
        "vocabulary_size": theirs.vocab_size,
        "activation": activations.OURS[theirs.activation_function],
        "learned_positions": theirs.n_positions,
        "norm_epsilon": theirs.layer_norm_epsilon,
        "tied_embeddings": theirs.tie_word_embeddings,
        "initialization_std": theirs.initializer_range,
    }


def _problems(theirs: Any) -> Iterator[str]:
    yield from activations.activation_problems("activation_function", theirs.activation_function)
    if not theirs.scale_attn_weights:
        yield "scale_attn_weights false; scores are divided by the root of the head size"
    if theirs.scale_attn_by_inverse_layer_idx:
        yield "scale_attn_by_inverse_layer_idx true; scores are not divided by the layer's number"


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    return {
        "vocab_size": model.vocabulary_size,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.layers,
        "n_head": model.attention_heads,
        "n_positions": model.learned_positions,
        "activation_function": activations.THEIRS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.initialization_std,
        "tie_word_embeddings": model.tied_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout),
    }


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys=KEYS,
    table=TABLE,
    free=SIZES | {"activation", "learned_positions"},
    fixed={
        "position_embedding": "learned",
        "normalization": "layernorm",
        "gated_feed_forward": False,
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
    },
    settings=_settings,
    config=_config,
    file_problems=_nothing_in_the_file,
    problems=_problems,
    lacks=plain_heads.other_heads,
    # Older files hold the causal mask and the number that it writes.
    derived=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    table_name=_with_body,
)
