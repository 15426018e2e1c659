"""SmolLM3: a Llama, some layers of which have no rotary embedding (every fourth by default)."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import WINDOWS
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, windows
from megatron_slm.convert.families.family import Family


def _settings(theirs: Any) -> dict[str, Any]:
    rotated = theirs.no_rope_layers[: theirs.num_hidden_layers]  # despite its name, 1 = rotated
    without = [layer for layer, rotates in enumerate(rotated) if not rotates]
    return llama_windows.settings_by_layer(theirs) | {"layers_without_rope": without}


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_windows.problems_by_layer(theirs)
    if not theirs.use_sliding_window and windows.WINDOWED in theirs.layer_types:
        yield f"layer_types names {windows.WINDOWED}, but use_sliding_window is false"
    given, layers = len(theirs.no_rope_layers), theirs.num_hidden_layers
    if given < layers:
        yield f"no_rope_layers is of {given} layers, the model of {layers}"


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    without, window = set(model.layers_without_rope), model.attention_window_tokens
    own = {
        "no_rope_layers": [int(layer not in without) for layer in range(model.layers)],
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "layer_types": windows.layer_types(model),
        "attention_bias": False,
        "mlp_bias": False,
    }
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=llama_like.KEYS | windows.CHOSEN_KEYS | {"no_rope_layers", "no_rope_layer_interval"},
    table=llama_like.TABLE,
    free=llama_like.FREE | {*WINDOWS, "layers_without_rope"},
    settings=_settings,
    config=_config,
    problems=_problems,
)
