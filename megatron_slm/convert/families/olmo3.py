"""OLMo 3: an OLMo 2 with a window in the layers that say so, whose rotary embedding no scaling
stretches.
"""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import WINDOWS
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, olmo2, rope_by_layer, windows
from megatron_slm.convert.families.family import Family


def _settings(theirs: Any) -> dict[str, Any]:
    sizes = llama_like.size_settings(theirs) | {"norm_epsilon": theirs.rms_norm_eps}
    return sizes | rope_by_layer.settings(theirs)


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_like.problems(theirs)
    yield from windows.window_problems(theirs, by_layer=True)
    yield from rope_by_layer.problems(theirs)
    bases = {rope["rope_theta"] for rope in theirs.rope_parameters.values()}
    if len(bases) > 1 and {windows.FULL, windows.WINDOWED} <= {*theirs.layer_types}:
        # transformers 4 has one. Given a rope_theta without rope_parameters, transformers 5 takes
        # it for the layers without a window alone, and 500000 for the others.
        yield (
            f"rope_theta of {windows.FULL} and of {windows.WINDOWED} differ "
            f"({' and '.join(map(str, sorted(bases)))}): an OLMo 3 has one; write it into both "
            "parts of rope_parameters"
        )


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = rope_by_layer.config(model, sequence_length) | {"attention_bias": False}
    return llama_like.config(model, sequence_length) | own


def _lacks(model: ModelConfig) -> Iterator[str]:
    yield from rope_by_layer.lacks(model)
    if model.attention_window_tokens and rope_by_layer.base_of_windows(model) != model.rope_base:
        yield (
            f"model.rope_base_windowed is {model.rope_base_windowed}, and always that of the other "
            f"layers ({model.rope_base}) in an Olmo3ForCausalLM"
        )


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    keys=llama_like.KEYS | windows.KEYS,
    table=olmo2.TABLE,
    free=llama_like.FREE | {*WINDOWS, "rope_base_windowed"},
    fixed=olmo2.NORMS,
    settings=_settings,
    config=_config,
    file_problems=rope_by_layer.file_problems,
    problems=_problems,
    lacks=_lacks,
)
