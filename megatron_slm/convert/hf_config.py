"""config.json of a Hugging Face model, out of and into ModelConfig.

Which architecture a model becomes: qk_norm -> Qwen3, qkv_bias -> Qwen2, otherwise Llama; with
experts, qk_norm -> Qwen3-MoE, otherwise Mixtral. Mistral folders are read as Llama.
"""

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.geometry import Geometry
from megatron_slm.tokenization import Tokenizer

MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def special_ids(tokenizer: Tokenizer | None) -> dict:
    """bos, eos and pad ids as config.json names them.

    Generation stops at the token that closes documents in the corpora.
    """
    if tokenizer is None:
        return {}
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def huggingface_architecture(model: ModelConfig) -> tuple[str, str]:
    """(class, model_type) of the Hugging Face model that computes the same.

    ValueError when there is none.
    """
    if model.qk_norm and model.qkv_bias:
        raise ValueError(
            "model.qk_norm together with model.qkv_bias has no Hugging Face architecture to "
            "export to; train with one of them"
        )
    if model.experts and model.qkv_bias:
        raise ValueError(
            "model.qkv_bias together with model.experts has no Hugging Face architecture to "
            "export to (Qwen2-MoE also has a shared expert)"
        )
    if model.experts and not model.qk_norm and not model.renormalize_experts:
        raise ValueError(
            "model.experts with renormalize_experts: false has no Hugging Face architecture to "
            "export to without model.qk_norm (Qwen3-MoE)"
        )
    if model.experts:
        return (
            ("Qwen3MoeForCausalLM", "qwen3_moe")
            if model.qk_norm
            else ("MixtralForCausalLM", "mixtral")
        )
    if model.qk_norm:
        return "Qwen3ForCausalLM", "qwen3"
    return ("Qwen2ForCausalLM", "qwen2") if model.qkv_bias else ("LlamaForCausalLM", "llama")


def huggingface_config(
    model: ModelConfig, sequence_length: int, tokenizer: Tokenizer | None, dtype: str
) -> dict:
    """config.json of an exported model, in the field names that transformers 4 and 5 both read."""
    geometry = Geometry.from_model(model)
    name, model_type = huggingface_architecture(model)
    config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": geometry.vocabulary_size,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.ffn_hidden_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.groups,
        "head_dim": geometry.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_scaling": rope_scaling(model),
        "attention_dropout": model.dropout,
        "initializer_range": model.initialization_std,
        "tie_word_embeddings": geometry.tied,
        "use_cache": True,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }
    if model_type == "mixtral":
        config |= {
            "num_local_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "sliding_window": None,
        }
    elif model_type == "qwen3_moe":
        config |= {
            "num_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": geometry.ffn_hidden_size,
            "norm_topk_prob": model.renormalize_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "use_sliding_window": False,
        }
    elif model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif model_type == "qwen3":
        config |= {"attention_bias": False, "use_sliding_window": False}
    else:
        config |= {"use_sliding_window": False}
    return config | special_ids(tokenizer)


def rope_scaling(model: ModelConfig) -> dict | None:
    """config.json's rope_scaling of our settings."""
    if model.rope_scaling == "none":
        return None
    scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": model.rope_low_frequency_factor,
            "high_freq_factor": model.rope_high_frequency_factor,
            "original_max_position_embeddings": model.rope_original_sequence_length,
        }
    return scaling


def rope_settings(config: dict) -> dict:
    """The rope_* fields of ModelConfig that a config.json describes; ValueError for a kind of
    scaling that is not implemented.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = {"rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return settings
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"rotary scaling {kind!r} (config.json says {rope}); implemented are linear and llama3"
        )
    settings |= {"rope_scaling": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "llama3":
        settings |= {
            "rope_low_frequency_factor": float(rope["low_freq_factor"]),
            "rope_high_frequency_factor": float(rope["high_freq_factor"]),
            "rope_original_sequence_length": int(
                rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            ),
        }
    return settings


def expert_settings(config: dict) -> dict:
    """The fields of ModelConfig about experts that a config.json describes."""
    if config.get("model_type") == "mixtral":
        return {
            "experts": config["num_local_experts"],
            "experts_per_token": config["num_experts_per_tok"],
        }
    if config.get("model_type") == "qwen3_moe":
        return {
            "experts": config["num_experts"],
            "experts_per_token": config["num_experts_per_tok"],
            "renormalize_experts": config.get("norm_topk_prob", False),
        }
    return {}


def model_config(config: dict) -> tuple[ModelConfig, int]:
    """(ModelConfig, sequence length) that compute what a config.json describes.

    ValueError naming every setting we have no place for.
    """
    model_type = config.get("model_type")
    problems = []
    if model_type not in MODEL_TYPES:
        problems.append(f"model_type {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")
    if model_type == "qwen3_moe" and (
        config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    ):
        problems.append(
            "dense layers among those of experts (mlp_only_layers or decoder_sparse_step)"
        )
    rope = {}
    try:
        rope = rope_settings(config)
    except ValueError as error:
        problems.append(str(error))
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r}; expected silu")
    if config.get("mlp_bias") or config.get("attention_bias"):
        problems.append(
            "biases on the attention output or feed-forward layers (attention_bias or mlp_bias "
            "true)"
        )
    if problems:
        raise ValueError("this Hugging Face model cannot be expressed here: " + "; ".join(problems))
    windowed = config.get("use_sliding_window", model_type == "mistral") and config.get(
        "sliding_window"
    )
    # Within its window, sliding attention is full attention: sequences up to that length are
    # computed exactly.
    sequence_length = min(
        config["max_position_embeddings"], windowed or config["max_position_embeddings"]
    )
    model = ModelConfig(
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config[
            "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
        ],
        attention_heads=config["num_attention_heads"],
        query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_size=config.get("head_dim")
        or (
            128 if model_type == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
        ),
        vocabulary_size=config["vocab_size"],
        **rope,
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        **expert_settings(config),
        initialization_std=config.get("initializer_range", 0.02),
    )
    return model, sequence_length
