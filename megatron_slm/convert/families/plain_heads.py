"""Families without grouped queries whose heads together are as wide as the hidden state."""

from collections.abc import Iterator

from megatron_slm.config.schema import ModelConfig


def other_heads(model: ModelConfig) -> Iterator[str]:
    """A phrase for each way in which the heads of `model` are others."""
    if model.query_groups not in (0, model.attention_heads):
        yield f"model.query_groups is {model.query_groups}, and always model.attention_heads"
    if model.head_size and model.head_size * model.attention_heads != model.hidden_size:
        yield f"model.head_size is {model.head_size}, and always hidden_size / attention_heads"
