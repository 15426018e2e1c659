"""Mistral: a Llama whose layers all have a sliding window."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, windows
from megatron_slm.convert.families.family import Family


def _settings(theirs: Any) -> dict[str, Any]:
    return llama_like.settings(theirs) | windows.window_settings(theirs)


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_like.problems(theirs)
    yield from windows.window_problems(theirs)


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {"sliding_window": model.attention_window_tokens or None}
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=llama_like.KEYS | windows.KEYS,
    table=llama_like.TABLE,
    free=llama_like.FREE | {"attention_window_tokens"},
    settings=_settings,
    config=_config,
    problems=_problems,
)
