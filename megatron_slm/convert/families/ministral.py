"""Ministral (transformers 5): a Mistral, some layers of which have no window."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import WINDOWS
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, windows
from megatron_slm.convert.families.family import Family


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {
        "sliding_window": model.attention_window_tokens,
        "layer_types": windows.layer_types(model),
    }
    return llama_like.config(model, sequence_length) | own


def _lacks(model: ModelConfig) -> Iterator[str]:
    if not model.attention_window_tokens:
        yield "model.attention_window_tokens is 0"


FAMILY = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    keys=llama_like.KEYS | windows.KEYS,
    table=llama_like.TABLE,
    free=llama_like.FREE | {*WINDOWS},
    settings=llama_windows.settings_by_layer,
    config=_config,
    problems=llama_windows.problems_by_layer,
    lacks=_lacks,
)
