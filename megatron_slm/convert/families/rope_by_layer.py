"""A rotary embedding for layers with a sliding window and one for the others, both ways.

transformers 5 has rope_parameters with an entry for each kind of layer; its files of before, and
transformers 4, have rope_scaling and rope_theta for layers that attend to the whole sequence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.architecture import ROPE_BY_LENGTH
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import windows
from megatron_slm.convert.families.rope import (
    key_number_problems,
    rope_problems,
    rope_scaling,
    rope_settings,
    scaling_problems,
)

BASE_OF_WINDOWS = "rope_local_base_freq"
"""Gemma 3's key of before transformers 5."""


def file_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What config.json says twice, or what nothing here computes, of the rotary embeddings."""
    by_layer = config.get("rope_parameters")
    if wrong := [*key_number_problems(config)]:
        yield from wrong
        return
    if by_layer is None:
        yield from rope_problems(config)
        return
    parts = by_layer.values() if isinstance(by_layer, Mapping) else [None]
    kinds = {windows.FULL, windows.WINDOWED}
    if not all(isinstance(part, Mapping) for part in parts) or not {*by_layer} <= kinds:
        yield (
            f"rope_parameters {by_layer!r}: expected a mapping for each of {windows.FULL} and "
            f"{windows.WINDOWED}"
        )
        return
    for kind, rope in by_layer.items():
        yield from scaling_problems(f"rope_parameters of {kind}", rope)
    yield from _said_twice(config, by_layer)


def _said_twice(config: Mapping[str, Any], by_layer: Mapping[str, Any]) -> Iterator[str]:
    """Keys of before transformers 5 that contradict rope_parameters."""
    full, windowed = (by_layer.get(kind, {}) for kind in (windows.FULL, windows.WINDOWED))
    scaling = {name: value for name, value in full.items() if name != "rope_theta"}
    given = config.get("rope_scaling")
    if given is not None and {"rope_type": "default", **given} != {
        "rope_type": "default",
        **scaling,
    }:
        yield (
            f"both rope_parameters of {windows.FULL} {dict(full)} and rope_scaling {given} are "
            "given: write everything into one of them"
        )
    for key, rope in (("rope_theta", full), (BASE_OF_WINDOWS, windowed)):
        if config.get(key) is not None and rope.get("rope_theta") not in (None, config[key]):
            yield f"{key} is given as {config[key]} and as {rope['rope_theta']}: keep one of them"


def problems(theirs: Any) -> Iterator[str]:
    """A phrase where layers with a window have a rotary embedding that is stretched, or the others
    one that depends on the length of the sequences.
    """
    of_others = theirs.rope_parameters[windows.FULL]["rope_type"]
    if of_others in ROPE_BY_LENGTH:
        yield f"rotary scaling {of_others!r}, which is not implemented in a {theirs.model_type}"
    kind = theirs.rope_parameters[windows.WINDOWED]["rope_type"]
    if kind != "default" and windows.WINDOWED in theirs.layer_types:
        yield (
            f"rotary scaling {kind!r} of {windows.WINDOWED}; implemented is that of {windows.FULL}"
        )


def settings(theirs: Any) -> dict[str, Any]:
    """The fields of ModelConfig about windows and rotary embeddings."""
    found = windows.window_settings(theirs, by_layer=True)
    if windows.FULL not in theirs.layer_types:
        return found | rope_settings(theirs.rope_parameters[windows.WINDOWED])
    found |= rope_settings(theirs.rope_parameters[windows.FULL])
    if found.get("attention_window_tokens"):
        base = float(theirs.rope_parameters[windows.WINDOWED]["rope_theta"])
        same = base == found["rope_base"] and "rope_scaling" not in found
        found["rope_base_windowed"] = 0.0 if same else base
    return found


def config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """config.json's keys about windows, and the rotary embeddings as transformers 5 has them."""
    full = {"rope_type": "default"} | (rope_scaling(model) or {}) | {"rope_theta": model.rope_base}
    windowed = {"rope_type": "default", "rope_theta": base_of_windows(model)}
    return {
        "rope_parameters": {windows.FULL: full, windows.WINDOWED: windowed},
        # transformers makes a mask of windows although no layer uses it, and needs a number.
        "sliding_window": model.attention_window_tokens or sequence_length,
        "layer_types": windows.layer_types(model),
    }


def base_of_windows(model: ModelConfig) -> float:
    """The base of the rotary embedding in layers with a window."""
    return model.rope_base_windowed or model.rope_base


def lacks(model: ModelConfig) -> Iterator[str]:
    """A phrase where layers with a window are stretched as the others are, or these by length."""
    if model.rope_scaling in ROPE_BY_LENGTH:
        yield f"model.rope_scaling is {model.rope_scaling}, which a rotary embedding by layer lacks"
    stretched = model.rope_scaling != "none" and not model.rope_base_windowed
    if model.attention_window_tokens and stretched:
        yield (
            f"model.rope_scaling {model.rope_scaling} is that of layers with a window too: "
            "model.rope_base_windowed is 0"
        )
