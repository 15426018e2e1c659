"""Qwen3-MoE: a Qwen3 whose feed-forward layers are mixtures of experts."""

from collections.abc import Iterator
from typing import Any

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import llama_like, llama_windows, mixtures, windows
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.table import changed

_BLOCK = "model.layers.{layer}.mlp."
_OWN_KEYS = {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}


def _settings(theirs: Any) -> dict[str, Any]:
    experts = {
        "ffn_hidden_size": theirs.moe_intermediate_size,
        "experts": theirs.num_experts,
        "experts_per_token": theirs.num_experts_per_tok,
        "renormalize_experts": theirs.norm_topk_prob,
    }
    return llama_windows.settings(theirs) | experts


def _problems(theirs: Any) -> Iterator[str]:
    yield from llama_windows.problems(theirs)
    yield from mixtures.expert_problems(
        theirs, theirs.num_experts, sum_to_one=theirs.norm_topk_prob
    )
    if theirs.mlp_only_layers or theirs.decoder_sparse_step != 1:
        yield "dense layers among those of experts (mlp_only_layers or decoder_sparse_step)"


def _config(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    own = {
        "num_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "moe_intermediate_size": model.ffn_hidden_size,
        "norm_topk_prob": model.renormalize_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }
    return llama_like.config(model, sequence_length) | windows.chosen_window(model) | own


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=llama_like.KEYS | windows.CHOSEN_KEYS | mixtures.KEYS | _OWN_KEYS,
    table=changed(
        llama_like.TABLE,
        *mixtures.mixture_rows(
            _BLOCK + "gate.weight",
            _BLOCK + "experts.{expert}.",
            ("gate_proj.weight", "up_proj.weight"),
            "down_proj.weight",
        ),
    ),
    free=llama_like.FREE | mixtures.FREE | {"attention_window_tokens"},
    fixed={"qk_norm": True},
    settings=_settings,
    config=_config,
    problems=_problems,
    lacks=mixtures.is_a_mixture,
)
