"""config.json of an exported model.

Which architecture a model becomes: qk_norm -> Qwen3, qkv_bias -> Qwen2, otherwise Llama; with
experts, qk_norm -> Qwen3-MoE, otherwise Mixtral. A sliding window makes a Llama a Mistral, or in
some layers a Ministral. hf_settings.py reads a config.json.
"""

from collections.abc import Sequence

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.geometry import Geometry
from megatron_slm.tokenization import Tokenizer


def special_ids(tokenizer: Tokenizer | None, end_ids: Sequence[int] = ()) -> dict:
    """bos, eos and pad ids as config.json names them.

    Generation stops at the token that closes documents in the corpora, and at each of `end_ids`.
    """
    if tokenizer is None:
        return {}
    ends = [tokenizer.eod_id, *(end for end in end_ids if end != tokenizer.eod_id)]
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
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
    if model.experts and model.full_attention_layers:
        raise ValueError(
            "model.full_attention_layers together with model.experts has no Hugging Face "
            "architecture to export to (in Mixtral and Qwen3-MoE all layers have the window)"
        )
    if model.experts:
        return (
            ("Qwen3MoeForCausalLM", "qwen3_moe")
            if model.qk_norm
            else ("MixtralForCausalLM", "mixtral")
        )
    if model.qk_norm:
        return "Qwen3ForCausalLM", "qwen3"
    if model.qkv_bias:
        return "Qwen2ForCausalLM", "qwen2"
    if not model.attention_window_tokens:
        return "LlamaForCausalLM", "llama"
    if model.full_attention_layers:
        return "MinistralForCausalLM", "ministral"
    return "MistralForCausalLM", "mistral"


def huggingface_config(
    model: ModelConfig,
    sequence_length: int,
    tokenizer: Tokenizer | None,
    dtype: str,
    end_ids: Sequence[int] = (),
) -> dict:
    """config.json of an exported model, in the field names that transformers 4 and 5 both read.

    end_ids: further ids at which generation stops.
    """
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
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
    }
    return config | _of_family(model, model_type) | special_ids(tokenizer, end_ids)


def _of_family(model: ModelConfig, model_type: str) -> dict:
    """The keys of config.json that one family has."""
    window = model.attention_window_tokens
    if model_type == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    if model_type == "mistral":
        return {"sliding_window": window}
    if model_type == "ministral":
        return {"sliding_window": window, "layer_types": _layer_types(model)}
    if model_type == "mixtral":
        return {
            "num_local_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "sliding_window": window or None,
        }
    windows: dict = {"use_sliding_window": False}
    if window:
        windows = {"use_sliding_window": True, "sliding_window": window}
    if model_type == "qwen3_moe":
        return windows | {
            "num_experts": model.experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.ffn_hidden_size,
            "norm_topk_prob": model.renormalize_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
        }
    if window:
        # Versions of transformers before 4.53 read max_window_layers alone: the layers from there
        # on have the window. It says the same where the full layers are the first ones.
        full = model.full_attention_layers
        windows |= {"layer_types": _layer_types(model), "max_window_layers": len(full)}
    return windows | ({"attention_bias": False} if model_type == "qwen3" else {})


def _layer_types(model: ModelConfig) -> list[str]:
    full = set(model.full_attention_layers)
    return [
        "full_attention" if layer in full else "sliding_attention" for layer in range(model.layers)
    ]


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
    if model.rope_scaling == "yarn":
        scaling |= {
            "original_max_position_embeddings": model.rope_original_sequence_length,
            "beta_fast": model.rope_beta_fast,
            "beta_slow": model.rope_beta_slow,
        }
        if model.rope_attention_factor:
            scaling["attention_factor"] = model.rope_attention_factor
    return scaling
