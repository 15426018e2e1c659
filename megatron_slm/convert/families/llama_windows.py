"""What families have that are a Llama with sliding windows: in all layers, or by layer_types."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.convert.families import llama_like, windows


def settings(theirs: Any) -> dict[str, Any]:
    """The fields of ModelConfig where all layers have the window, or none."""
    return llama_like.settings(theirs) | windows.window_settings(theirs)


def settings_by_layer(theirs: Any) -> dict[str, Any]:
    """The fields of ModelConfig where layer_types says which layers have the window."""
    return llama_like.settings(theirs) | windows.window_settings(theirs, by_layer=True)


def problems(theirs: Any) -> Iterator[str]:
    """What the decoder here does not have, where all layers have the window, or none."""
    yield from llama_like.problems(theirs)
    yield from windows.window_problems(theirs)


def problems_by_layer(theirs: Any) -> Iterator[str]:
    """What the decoder here does not have, where layer_types says which layers have the window."""
    yield from llama_like.problems(theirs)
    yield from windows.window_problems(theirs, by_layer=True)
