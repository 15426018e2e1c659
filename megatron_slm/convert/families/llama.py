"""Llama 2 and 3, TinyLlama, SmolLM2 and others that transformers opens as Llama."""

from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like
from megatron_slm.convert.families.family import Family


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {"attention_bias": False, "mlp_bias": False}
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=llama_like.KEYS,
    table=llama_like.TABLE,
    free=llama_like.FREE,
    settings=llama_like.settings,
    config=_config,
    problems=llama_like.problems,
)
