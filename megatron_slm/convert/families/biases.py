"""One key for all biases of attention, config.json's attention_bias, and our two settings."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import written
from megatron_slm.config.schema import ModelConfig

ATTENTION = ("qkv_bias", "attention_output_bias")


def attention_settings(theirs: Any) -> dict[str, Any]:
    """Biases on queries, keys and values, and on attention's output, or on none of them."""
    return dict.fromkeys(ATTENTION, theirs.attention_bias)


def one_bias_in_attention(model: ModelConfig) -> Iterator[str]:
    """A phrase where `model` has biases on one side of attention only."""
    if model.qkv_bias != model.attention_output_bias:
        yield (
            f"model.qkv_bias is {written(model.qkv_bias)} and model.attention_output_bias is "
            f"{written(model.attention_output_bias)}, and always the same"
        )
