"""Phi-3: a Mistral with queries, keys and values in one matrix, and gate and up projection too."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, windows
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.table import Row, changed
from megatron_slm.convert.tensors import LAYER
from megatron_slm.convert.transforms import QKV_STACKED

_LAYER = "model.layers.{layer}."
_OWN_KEYS = {"original_max_position_embeddings", "resid_pdrop", "embd_pdrop"}
"""The first one matters under longrope alone, and is used there; the others are dropout."""
_SCALINGS = ("none", "longrope")


def _settings(theirs: Any) -> dict[str, Any]:
    return llama_like.settings(theirs) | windows.window_settings(theirs)


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_like.problems(theirs)
    yield from windows.window_problems(theirs)


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
    settings=_settings,
    config=_config,
    problems=_problems,
    lacks=_lacks,
)
