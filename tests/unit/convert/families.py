"""Every kind of model that goes to Hugging Face, and that comes from there."""

# V = 101 of 128 embedding rows; compared on S = 24 tokens.
SIZES = dict(
    layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    attention_heads=4,
    vocabulary_size=101,
    pad_vocabulary_to_multiple_of=64,
    rope_base=5000.0,
)
NEOX = {
    "normalization": "layernorm",
    "activation": "gelu",
    "gated_feed_forward": False,
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "rope_fraction": 0.25,
    "parallel_residual": True,
}
WINDOWED = {"attention_window_tokens": 7, "full_attention_layers": [1, 3]}
OLMO = {"norm_placement": "after", "qk_norm": True, "qk_norm_over": "all_heads"}
GEMMA = {
    "query_groups": 2,
    "activation": "gelu_tanh",
    "norm_placement": "both",
    "zero_centered_norms": True,
    "qk_norm": True,
    "embedding_scale": 32**0.5,
}
VARIANTS = {
    "LlamaForCausalLM": {"query_groups": 2, "norm_epsilon": 1e-6},
    "Qwen2ForCausalLM": {"query_groups": 2, "qkv_bias": True, "tied_embeddings": True},
    "Qwen3ForCausalLM": {"query_groups": 4, "qk_norm": True, "head_size": 16},
    # 24 tokens of context stretched from 16: the five channels lie on both sides of the blend and
    # in it.
    "LlamaForCausalLM, llama3": {
        "head_size": 10,
        "rope_base": 100.0,
        "rope_scaling": "llama3",
        "rope_scaling_factor": 3.0,
        "rope_original_sequence_length": 16,
        "rope_low_frequency_factor": 0.5,
        "rope_high_frequency_factor": 2.0,
    },
    "MixtralForCausalLM": {"query_groups": 2, "experts": 4},
    "Qwen3MoeForCausalLM": {
        "query_groups": 4,
        "qk_norm": True,
        "experts": 4,
        "experts_per_token": 3,
        "renormalize_experts": False,
    },
    "MistralForCausalLM": {"query_groups": 2, "attention_window_tokens": 7},
    "MinistralForCausalLM": {"attention_window_tokens": 7, "full_attention_layers": [1, 3]},
    "Qwen2ForCausalLM, window": {
        "qkv_bias": True,
        "attention_window_tokens": 7,
        "full_attention_layers": [0, 1],
    },
    "Qwen3ForCausalLM, window": {
        "qk_norm": True,
        "attention_window_tokens": 7,
        "full_attention_layers": [2],
    },
    "MixtralForCausalLM, window": {"experts": 4, "attention_window_tokens": 7},
    "Qwen3MoeForCausalLM, window": {
        "qk_norm": True,
        "experts": 4,
        "attention_window_tokens": 7,
    },
    "Qwen3ForCausalLM, yarn": {
        "qk_norm": True,
        "head_size": 16,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_sequence_length": 12,
        "rope_beta_fast": 1.5,
        "rope_beta_slow": 0.2,
    },
    "Olmo3ForCausalLM": OLMO
    | WINDOWED
    | {
        "head_size": 10,
        "rope_base_windowed": 5000.0,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_sequence_length": 12,
    },
    "Gemma3ForCausalLM, no windows": GEMMA,
    "LlamaForCausalLM, linear": {"rope_scaling": "linear", "rope_scaling_factor": 2.5},
    "LlamaForCausalLM, biases": {
        "query_groups": 2,
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
    },
    "GPTNeoXForCausalLM": NEOX
    | {
        "qkv_bias": False,
        "attention_output_bias": False,
        "parallel_residual": False,
        "activation": "gelu_tanh",
        "rope_fraction": 0.5,
        "rope_scaling": "linear",
        "rope_scaling_factor": 2.5,
        "tied_embeddings": True,
    },
    "GPT2LMHeadModel": NEOX
    | {
        "activation": "gelu_tanh",
        "rope_base": 10000.0,
        "rope_fraction": 1.0,
        "parallel_residual": False,
        "position_embedding": "learned",
        "learned_positions": 24,
        "tied_embeddings": True,
    },
}
COMMON = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
)
PEERS = {  # models of transformers that are imported
    "qwen2": COMMON
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 16,
        },
    },
    # Its own defaults: rope_theta 1e6, rms_norm_eps 1e-5.
    "mixtral": {name: value for name, value in COMMON.items() if name != "rms_norm_eps"}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "llama": COMMON
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 1.3,
        },
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": COMMON | {"sliding_window": 7},
    "ministral": COMMON
    | {
        "head_dim": 8,  # transformers 5.24 cannot build the model without it
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neox": dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        layer_norm_eps=1e-4,
        rotary_pct=0.5,
        rotary_emb_base=500.0,
    ),
    "gpt2": dict(
        vocab_size=101,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "qwen3": COMMON | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}
