"""Family x option: the small models of transformers that test_matrix.py imports and gives back.

The first option of each family is tried in every run of the tests.
"""

from typing import Any

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FULL, WINDOWED = "full_attention", "sliding_attention"


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


_LLAMA3 = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=16,
)
_LINEAR = _rope("linear", factor=2.5)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
_YARN_NUMBERS = _rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=1.5,
    beta_slow=0.2,
    attention_factor=1.3,
)
_YARN_BEFORE = {
    name: value for name, value in _YARN_NUMBERS["rope_parameters"].items() if name != "rope_theta"
}
_DYNAMIC = _rope("dynamic", factor=3.0)
_LONGROPE = _rope("longrope", short_factor=[1.0, 1.2, 1.5, 1.7], long_factor=[1.0, 2.0, 4.0, 7.0])
_TIED = {"tie_word_embeddings": True}
_EVERY_HEAD = {"num_key_value_heads": 4}
_HEAD_SIZE = {"head_dim": 10}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
_WINDOW = {"sliding_window": 7}
_CHOSEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7}
_BY_LAYER = {"layer_types": [WINDOWED, FULL, WINDOWED, FULL]}
_NO_WINDOW = {"sliding_window": None}
_NEVER_ROTATED = {"no_rope_layers": [0, 0, 0, 0]}

_PLAIN = _rope("default")


def _rope_by_layer(full: dict[str, Any], base_of_windows: float) -> dict[str, Any]:
    windowed = {"rope_type": "default", "rope_theta": base_of_windows}
    return {"rope_parameters": {FULL: full["rope_parameters"], WINDOWED: windowed}}


_QUERY_SCALE = {"query_pre_attn_scalar": 12}
GEMMA3 = _QUERY_SCALE | _WINDOW | _BY_LAYER | _HEAD_SIZE | _rope_by_layer(_LINEAR, 100.0)
OLMO3 = _WINDOW | _BY_LAYER | _rope_by_layer(_YARN, 500.0)

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "yarn": _YARN_NUMBERS,
        "plain": {},
        "tied, every head": _TIED | _EVERY_HEAD,
        "head size": _HEAD_SIZE,
        "llama3": _LLAMA3,
        "linear": _LINEAR,
        "biases of attention": {"attention_bias": True},
        "biases of the feed-forward layer": {"mlp_bias": True},
        # The 24 tokens are more than the model's own length in one case.
        "dynamic, beyond": _DYNAMIC | {"max_position_embeddings": 16},
        "dynamic, within": _DYNAMIC,
        "longrope": _rope(
            "longrope",
            short_factor=[1.0] * 4,
            long_factor=[1.0, 2.0, 3.0, 5.0],
            original_max_position_embeddings=16,
            factor=2.5,
            attention_factor=1.2,
        ),
    },
    "mistral": {
        "window": _WINDOW,
        "no window, tied": _NO_WINDOW | _TIED,
        "window, head size, yarn": _WINDOW | _HEAD_SIZE | _YARN,
    },
    "ministral": {
        # transformers 5.24 cannot build the model without head_dim.
        "by layer": _WINDOW | _BY_LAYER | {"head_dim": 8},
        "every layer, tied": _WINDOW | {"layer_types": [WINDOWED] * 4, "head_dim": 8} | _TIED,
    },
    "mixtral": {
        "window": _EXPERTS | _WINDOW,
        # Nor this one with YaRN.
        "no window, every expert, yarn": _EXPERTS
        | _NO_WINDOW
        | _YARN
        | {"num_experts_per_tok": 4, "head_dim": 8},
    },
    "qwen2": {
        "tied, llama3": _TIED | _LLAMA3,
        "plain": {},
        "window": _CHOSEN_WINDOW | {"max_window_layers": 1},
        "window by layer, yarn": _CHOSEN_WINDOW | _BY_LAYER | _YARN,
    },
    "qwen3": {
        "window": _CHOSEN_WINDOW | {"max_window_layers": 1},
        "head size, tied": _HEAD_SIZE | _TIED,
        "window by layer, yarn": _CHOSEN_WINDOW | _BY_LAYER | _YARN,
    },
    "qwen3_moe": {
        "shares of all": _QWEN_EXPERTS | {"norm_topk_prob": False},
        "window, weights sum to 1": _QWEN_EXPERTS | _CHOSEN_WINDOW | {"norm_topk_prob": True},
    },
    "smollm3": {
        "every fourth, untied": {"tie_word_embeddings": False},
        "some, yarn": _YARN | {"no_rope_layers": [1, 0, 1, 0]},
        "all, tied": _NEVER_ROTATED,
        "windows": _CHOSEN_WINDOW | {"no_rope_layer_interval": 2},
        "windows by layer, head size": _CHOSEN_WINDOW | _BY_LAYER | _HEAD_SIZE,
    },
    "olmo2": {
        "linear, head size": _LINEAR | _HEAD_SIZE,
        "tied, every head, yarn": _TIED | _EVERY_HEAD | _YARN_NUMBERS,
    },
    "olmo3": {
        "yarn": OLMO3,
        "every fourth, as before transformers 5": _WINDOW
        | {"rope_theta": 500000.0, "rope_scaling": _YARN_BEFORE},
        "every layer": _WINDOW | {"layer_types": [WINDOWED] * 4} | _rope_by_layer(_PLAIN, 500.0),
    },
    "gemma3_text": {
        "scaled": GEMMA3,
        "plain, untied": _QUERY_SCALE
        | _WINDOW
        | _BY_LAYER
        | {"tie_word_embeddings": False, "head_dim": 8},
        "no windows": _QUERY_SCALE | {"layer_types": [FULL] * 4, "head_dim": 8},
        "as before transformers 5": _QUERY_SCALE
        | {
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "head_dim": 8,
            "rope_theta": 700.0,
            "rope_local_base_freq": 50.0,
        },
    },
    "phi3": {
        "window": _WINDOW,
        "every head, tied": _EVERY_HEAD | _TIED,
        "longrope, beyond": _LONGROPE | {"original_max_position_embeddings": 16},
        "longrope, within": _LONGROPE | {"original_max_position_embeddings": 32},
    },
    "gpt_neox": {
        "half of each head": {"rotary_pct": 0.5},
        "one after the other, tied, tanh": {
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "rotary_pct": 0.25,
        }
        | _TIED,
        "whole heads, no biases of attention": {"rotary_pct": 1.0, "attention_bias": False},
        "linear, relu": _rope("linear", factor=2.5, partial_rotary_factor=0.5)
        | {"hidden_act": "relu"},
        "dynamic, beyond": _DYNAMIC | {"max_position_embeddings": 16, "rotary_pct": 0.5},
    },
    "gpt2": {
        "plain": {},
        "untied, wide, gelu": {
            "tie_word_embeddings": False,
            "n_inner": 80,
            "activation_function": "gelu",
        },
    },
}
"""model_type -> option -> settings beside SIZES."""
