"""Llama 2 and 3, TinyLlama, SmolLM2 and others that transformers opens as Llama."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import biases, llama_like
from megatron_slm.convert.families.family import Family


def _settings(theirs: Any) -> dict[str, Any]:
    feed_forward = {"feed_forward_bias": theirs.mlp_bias}
    return llama_like.settings(theirs) | biases.attention_settings(theirs) | feed_forward


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {"attention_bias": model.qkv_bias, "mlp_bias": model.feed_forward_bias}
    return llama_like.config(model, sequence_length) | own


def _lacks(model: ModelConfig) -> Iterator[str]:
    yield from biases.one_bias_in_attention(model)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=llama_like.KEYS | {"attention_bias", "mlp_bias"},
    table=llama_like.TABLE,
    free=llama_like.FREE | {*biases.ATTENTION, "feed_forward_bias"},
    settings=_settings,
    config=_config,
    problems=llama_like.problems,
    lacks=_lacks,
)
