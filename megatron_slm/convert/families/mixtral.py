"""Mixtral: a Mistral whose feed-forward layers are mixtures of experts."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, mixtures, windows
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.table import changed

_BLOCK = "model.layers.{layer}.block_sparse_moe."


def _settings(theirs: Any) -> dict[str, Any]:
    experts = {
        "experts": theirs.num_local_experts,
        "experts_per_token": theirs.num_experts_per_tok,
    }
    return llama_windows.settings(theirs) | experts


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_windows.problems(theirs)
    yield from mixtures.expert_problems(theirs, theirs.num_local_experts, sum_to_one=True)


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "sliding_window": model.attention_window_tokens or None,
    }
    return llama_like.config(model, sequence_length) | own


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=llama_like.KEYS | windows.KEYS | mixtures.KEYS,
    table=changed(
        llama_like.TABLE,
        *mixtures.mixture_rows(
            _BLOCK + "gate.weight",
            _BLOCK + "experts.{expert}.",
            ("w1.weight", "w3.weight"),
            "w2.weight",
        ),
    ),
    free=llama_like.FREE | {"attention_window_tokens", "experts", "experts_per_token"},
    settings=_settings,
    config=_config,
    problems=_problems,
    lacks=mixtures.is_a_mixture,
)
