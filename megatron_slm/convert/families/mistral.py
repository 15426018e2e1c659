"""Mistral: a Llama whose layers all have a sliding window."""

from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, windows
from megatron_slm.convert.families.family import Family


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {"sliding_window": model.attention_window_tokens or None}
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=llama_like.KEYS | windows.KEYS,
    table=llama_like.TABLE,
    free=llama_like.FREE | {"attention_window_tokens"},
    settings=llama_windows.settings,
    config=_config,
    problems=llama_windows.problems,
)
