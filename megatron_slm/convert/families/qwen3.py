"""Qwen3: norms on queries and keys; a window in the layers that say so."""

from typing import Any

from megatron_slm.config.architecture import WINDOWS
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, windows
from megatron_slm.convert.families.family import Family


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = windows.chosen_window_by_layer(model) | {"attention_bias": False}
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=llama_like.KEYS | windows.CHOSEN_KEYS,
    table=llama_like.TABLE,
    free=llama_like.FREE | {*WINDOWS},
    fixed={"qk_norm": True},
    settings=llama_windows.settings_by_layer,
    config=_config,
    problems=llama_windows.problems_by_layer,
)
