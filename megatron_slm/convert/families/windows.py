"""Sliding windows, between config.json and our settings.

by_layer: whether the layers of the family follow layer_types; in other families all layers have the
window.
"""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ModelConfig

FULL, WINDOWED = "full_attention", "sliding_attention"
"""The kinds of layers, as layer_types names them."""
KEYS = frozenset(("sliding_window", "layer_types"))
CHOSEN_KEYS = KEYS | {"use_sliding_window", "max_window_layers"}
"""The keys of families whose window is in use only where use_sliding_window says so."""


def window_problems(theirs: Any, *, by_layer: bool = False) -> Iterator[str]:
    """Kinds of layers that contradict sliding_window, or that are not implemented."""
    window = getattr(theirs, "sliding_window", None)
    layers = getattr(theirs, "layer_types", None) or []
    kinds = sorted({*layers} - {FULL, WINDOWED})
    if kinds:
        yield f"layer_types {', '.join(kinds)}; implemented are {FULL} and {WINDOWED}"
    if window is not None and window < 1 and (not by_layer or WINDOWED in layers):
        yield f"sliding_window {window}; expected at least 1 token, or null for no window"
    if not by_layer:
        of_every_layer = FULL if window is None else WINDOWED
        if {*layers} - {of_every_layer, *kinds}:
            yield (
                f"layer_types with sliding_window {window}: in a {theirs.model_type} every layer "
                f"is of {of_every_layer}"
            )
    elif WINDOWED in layers and window is None:
        yield f"layer_types names {WINDOWED}, but sliding_window is not set, or not used"
    elif len(layers) != theirs.num_hidden_layers:
        yield f"layer_types is of {len(layers)} layers, the model of {theirs.num_hidden_layers}"


def window_settings(theirs: Any, *, by_layer: bool = False) -> dict[str, Any]:
    """The fields of ModelConfig about sliding windows."""
    window = getattr(theirs, "sliding_window", None)
    full: list[int] = []
    if by_layer:
        full = [layer for layer, kind in enumerate(theirs.layer_types) if kind == FULL]
    if window is None or len(full) == theirs.num_hidden_layers:
        return {}
    return {"attention_window_tokens": window, "full_attention_layers": full}


def layer_types(model: ModelConfig) -> list[str]:
    """config.json's layer_types."""
    full = set(model.full_attention_layers)
    if not model.attention_window_tokens:
        full = set(range(model.layers))
    return [FULL if layer in full else WINDOWED for layer in range(model.layers)]


def chosen_window(model: ModelConfig) -> dict[str, Any]:
    """The keys of a family that has use_sliding_window, for a window in every layer or none."""
    window = model.attention_window_tokens
    if not window:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": window}


def chosen_window_by_layer(model: ModelConfig) -> dict[str, Any]:
    """The keys of a family that has use_sliding_window and layer_types."""
    keys = chosen_window(model)
    if not model.attention_window_tokens:
        return keys
    # Versions of transformers before 4.53 read max_window_layers alone: the layers from there on
    # have the window. It says the same where the full layers are the first ones.
    full = model.full_attention_layers
    return keys | {"layer_types": layer_types(model), "max_window_layers": len(full)}
