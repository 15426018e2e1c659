"""Phi-3: a Mistral with queries, keys and values in one matrix, and gate and up projection too."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.architecture import ROPE
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, windows
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.table import Row, changed
from megatron_slm.convert.tensors import LAYER
from megatron_slm.convert.transforms import QKV_STACKED

_LAYER = "model.layers.{layer}."
_OWN_KEYS = {"original_max_position_embeddings", "resid_pdrop", "embd_pdrop"}
"""The first one matters under longrope alone; the others are dropout."""


def _settings(theirs: Any) -> dict[str, Any]:
    return llama_like.settings(theirs) | windows.window_settings(theirs)


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_like.problems(theirs)
    yield from windows.window_problems(theirs)


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {
        "original_max_position_embeddings": sequence_length,
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
    free=llama_like.FREE - {*ROPE} | {"rope_base", "attention_window_tokens"},
    settings=_settings,
    config=_config,
    problems=_problems,
)
