"""Small models of transformers' own classes, and a tokenizer for them."""

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
_ROPE_BY_LAYER = {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
OWN = {
    "gpt_neox": {"rotary_pct": 0.5},  # of heads of 4 channels
    "olmo3": {"rope_parameters": _ROPE_BY_LAYER},
    "gemma3_text": {"rope_parameters": _ROPE_BY_LAYER},
}
LACKING = {
    "gpt_neox": {"head_dim", "num_key_value_heads", "rms_norm_eps"},
    "gpt2": {
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "intermediate_size",
    },
}
"""Settings of most families that one does not have: it is made without them."""


def small_model(model_type: str, **settings: Any):
    """A random model of a few thousand parameters."""
    given = SIZES | EXPERTS.get(model_type, {}) | OWN.get(model_type, {}) | settings
    if model_type == "mistral" and "sliding_window" not in settings:
        given["sliding_window"] = None
    return random_model(model_type, **given)


def random_model(model_type: str, spread: float = 0.2, **settings: Any):
    """A model of transformers with every parameter drawn at random, the same at each call.

    spread: the standard deviation of what is added to the parameters of a new model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    lacking = LACKING.get(model_type, set())
    given = {name: value for name, value in settings.items() if name not in lacking}
    config = AutoConfig.for_model(model_type, **given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def word_tokenizer(folder: Path) -> None:
    """A tokenizer.json of 28 ids: unknown, end of text and the letters."""
    from tokenizers import Tokenizer, models

    ids = {"<unk>": 0, "</s>": 1} | {chr(97 + i): 2 + i for i in range(26)}
    Tokenizer(models.WordLevel(ids, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
