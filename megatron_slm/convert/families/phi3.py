"""Phi-3: a Mistral with queries, keys and values in one matrix, and gate and up projection too."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, windows
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.families.rope import rope_problems
from megatron_slm.convert.table import Row, changed
from megatron_slm.convert.tensors import LAYER
from megatron_slm.convert.transforms import QKV_STACKED

_LAYER = "model.layers.{layer}."
_OWN_KEYS = {"original_max_position_embeddings", "resid_pdrop", "embd_pdrop", "auto_map"}
"""The first one matters under longrope alone, and is used there; two are dropout."""
_PUBLISHED_CODE = {"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"}
"""What Microsoft's own folders name: the code that became the class of transformers."""
_SCALINGS = ("none", "longrope")


def _file_problems(config: Mapping[str, Any]) -> Iterator[str]:
    yield from rope_problems(config)
    code = config.get("auto_map") or {}
    if other := {*map(str, code.values())} - _PUBLISHED_CODE:
        yield (
            f"auto_map names {', '.join(sorted(other))}: the model has code of its own; take the "
            "key out if its built-in class computes the same"
        )


def _lacks(model: ModelConfig) -> Iterator[str]:
    if model.rope_scaling not in _SCALINGS:
        yield f"model.rope_scaling is {model.rope_scaling}, and {' or '.join(_SCALINGS)} in a Phi-3"


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    scaled = model.rope_scaling == "longrope"
    own = {
        # transformers takes it from here, and not from rope_scaling as in other families.
        "original_max_position_embeddings": (
            model.rope_original_sequence_length if scaled else sequence_length
        ),
        "sliding_window": model.attention_window_tokens or None,
    }
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys=llama_like.KEYS | windows.KEYS | _OWN_KEYS,
    table=changed(
        llama_like.TABLE,
        Row(
            LAYER + "self_attention.linear_qkv.weight",
            (_LAYER + "self_attn.qkv_proj.weight",),
            QKV_STACKED,
        ),
        Row(LAYER + "mlp.linear_fc1.weight", (_LAYER + "mlp.gate_up_proj.weight",)),
    ),
    free=llama_like.FREE | {"attention_window_tokens"},
    settings=llama_windows.settings,
    config=_config,
    file_problems=_file_problems,
    problems=llama_windows.problems,
    lacks=_lacks,
)
