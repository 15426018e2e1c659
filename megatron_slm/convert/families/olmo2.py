"""OLMo 2: norms on the outputs of attention and feed-forward layer, and over all heads."""

from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.table import Row, changed
from megatron_slm.convert.tensors import LAYER

_THEIRS = "model.layers.{layer}."
NORMS = {"norm_placement": "after", "qk_norm": True, "qk_norm_over": "all_heads"}
"""Of every OLMo 2 and OLMo 3."""
TABLE = changed(
    llama_like.TABLE,
    Row(LAYER + "post_self_attn_layernorm.weight", (_THEIRS + "post_attention_layernorm.weight",)),
    Row(LAYER + "post_mlp_layernorm.weight", (_THEIRS + "post_feedforward_layernorm.weight",)),
)


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    return llama_like.config(model, sequence_length) | {"attention_bias": False}


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=llama_like.KEYS,
    table=TABLE,
    free=llama_like.FREE,
    fixed=NORMS,
    settings=llama_like.settings,
    config=_config,
    problems=llama_like.problems,
)
