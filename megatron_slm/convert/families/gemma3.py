"""Gemma 3, the text models: norms on both sides of each part, zero-centered; GeGLU; a scaled
embedding; windows with a rotary base of their own.
"""

import math
from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import WINDOWS
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, rope_by_layer, windows
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.families.rope import rope_scaling
from megatron_slm.convert.table import Row, changed
from megatron_slm.convert.tensors import LAYER

_THEIRS = "model.layers.{layer}."
_ACTIVATION = "gelu_pytorch_tanh"
_OWN_KEYS = frozenset(
    (
        "hidden_activation",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        rope_by_layer.BASE_OF_WINDOWS,
        "sliding_window_pattern",  # makes layer_types where these are absent
        "_sliding_window_pattern",
        "cache_implementation",  # of generation
    )
)


def _settings(theirs: Any) -> dict[str, Any]:
    sizes = llama_like.size_settings(theirs)
    squared = float(theirs.query_pre_attn_scalar)
    own = {
        "norm_epsilon": theirs.rms_norm_eps,
        "embedding_scale": theirs.hidden_size**0.5,
        "attention_scale_size": 0.0 if squared == sizes["head_size"] else squared,
    }
    return sizes | own | rope_by_layer.settings(theirs)


def _problems(theirs: Any) -> Iterator[str]:
    if theirs.hidden_activation != _ACTIVATION:
        yield f"hidden_activation {theirs.hidden_activation!r}; expected {_ACTIVATION}"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(theirs, key) is not None:
            yield f"{key} {getattr(theirs, key)}: soft caps (Gemma 2) are not implemented"
    if theirs.query_pre_attn_scalar <= 0:
        yield f"query_pre_attn_scalar {theirs.query_pre_attn_scalar}; expected above 0"
    if theirs.use_bidirectional_attention:
        yield "use_bidirectional_attention true: attention here is causal"
    yield from windows.window_problems(theirs, by_layer=True)
    yield from rope_by_layer.problems(theirs)


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    sizes = llama_like.size_keys(model, sequence_length)
    own = {
        "hidden_activation": _ACTIVATION,
        "rms_norm_eps": model.norm_epsilon,
        "query_pre_attn_scalar": int(model.attention_scale_size or sizes["head_dim"]),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
    }
    return sizes | own | rope_by_layer.config(model, sequence_length) | _before_version_5(model)


def _before_version_5(model: ModelConfig) -> dict[str, Any]:
    return {
        "rope_theta": model.rope_base,
        "rope_scaling": rope_scaling(model),
        rope_by_layer.BASE_OF_WINDOWS: rope_by_layer.base_of_windows(model),
    }


def _lacks(model: ModelConfig) -> Iterator[str]:
    yield from rope_by_layer.lacks(model)
    expected = model.hidden_size**0.5
    if not math.isclose(model.embedding_scale, expected, rel_tol=1e-7):
        yield (
            f"model.embedding_scale is {model.embedding_scale}, and always the square root of "
            f"hidden_size ({expected}) in a Gemma3ForCausalLM"
        )
    if not model.attention_scale_size.is_integer():
        yield (
            f"model.attention_scale_size is {model.attention_scale_size}, and always a whole "
            "number in a Gemma3ForCausalLM"
        )
    if model.hidden_size % model.attention_heads:
        yield (
            f"model.attention_heads is {model.attention_heads}, and always divides hidden_size "
            f"({model.hidden_size}) in a Gemma3ForCausalLM"
        )


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=llama_like.KEYS - {"hidden_act"} | windows.KEYS | _OWN_KEYS,
    table=changed(
        llama_like.TABLE,
        Row(
            LAYER + "post_self_attn_layernorm.weight",
            (_THEIRS + "post_attention_layernorm.weight",),
        ),
        Row(LAYER + "pre_mlp_layernorm.weight", (_THEIRS + "pre_feedforward_layernorm.weight",)),
        Row(LAYER + "post_mlp_layernorm.weight", (_THEIRS + "post_feedforward_layernorm.weight",)),
    ),
    free=llama_like.FREE
    | {*WINDOWS, "rope_base_windowed", "embedding_scale", "attention_scale_size"},
    fixed={
        "activation": "gelu_tanh",
        "norm_placement": "both",
        "zero_centered_norms": True,
        "qk_norm": True,
    },
    settings=_settings,
    config=_config,
    file_problems=rope_by_layer.file_problems,
    problems=_problems,
    lacks=_lacks,
)
