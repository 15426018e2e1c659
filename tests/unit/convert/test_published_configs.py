"""config.json as published models have it, in the names of old versions of transformers: they are
read, and the model has as many parameters as its authors say.
"""

from dataclasses import replace

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.convert.hf_settings import model_config
from megatron_slm.planning.parameters import parameters_of_model

PYTHIA_410M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT_2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
OLMO_2_7B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
    "use_cache": False,
    "vocab_size": 100352,
}
OLMO_3_7B = OLMO_2_7B | {
    "architectures": ["Olmo3ForCausalLM"],
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
    "vocab_size": 100278,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PHI_3_MINI_4K = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    "published, parameters, sequence_length",
    [
        (PYTHIA_410M, 405_334_016, 2048),
        (GPT_2, 124_439_808, 1024),
        (OLMO_2_7B, 7_298_617_344, 4096),
        (OLMO_3_7B, 7_298_011_136, 65536),
        (GEMMA_3_1B, 999_885_952, 32768),
        (PHI_3_MINI_4K, 3_821_079_552, 4096),
        (SMOLLM3_3B, 3_075_098_624, 65536),
    ],
    ids=[
        "pythia-410m",
        "gpt2",
        "olmo-2-7b",
        "olmo-3-7b",
        "gemma-3-1b",
        "phi-3-mini-4k",
        "smollm3-3b",
    ],
)
def test_a_published_model_has_its_parameters(published, parameters, sequence_length):
    model, length = model_config(published)
    assert length == sequence_length
    config = Config(model=replace(model, pad_vocabulary_to_multiple_of=1))
    assert parameters_of_model(config, model.vocabulary_size).total == parameters


def test_pythia_is_what_its_paper_says():
    model, _ = model_config(PYTHIA_410M)
    assert (model.rope_fraction, model.parallel_residual) == (0.25, True)
    assert (model.qkv_bias, model.attention_output_bias) == (True, True)
    assert (model.activation, model.gated_feed_forward) == ("gelu", False)


def test_olmo_3_stretches_the_layers_without_a_window_alone():
    model, _ = model_config(OLMO_3_7B)
    assert (model.norm_placement, model.qk_norm_over) == ("after", "all_heads")
    assert model.full_attention_layers == [3, 7, 11, 15, 19, 23, 27, 31]
    assert (model.rope_scaling, model.rope_base) == ("yarn", 500000.0)
    assert model.rope_base_windowed == 500000.0


def test_gemma_3_has_two_rotary_bases_and_a_scaled_embedding():
    model, _ = model_config(GEMMA_3_1B)
    assert (model.norm_placement, model.zero_centered_norms) == ("both", True)
    assert model.full_attention_layers == [5, 11, 17, 23]
    assert (model.rope_base, model.rope_base_windowed) == (1e6, 1e4)
    assert model.embedding_scale == 1152**0.5


def test_phi_3_and_smollm3_are_what_their_settings_say():
    phi, _ = model_config(PHI_3_MINI_4K)
    assert (phi.attention_window_tokens, phi.full_attention_layers) == (2047, [])
    smol, _ = model_config(SMOLLM3_3B)
    assert smol.layers_without_rope == list(range(3, 36, 4))
    assert smol.attention_window_tokens == 0
    with pytest.raises(
        ValueError, match=r"auto_map names mine\.Phi: the model has code of its own"
    ):
        model_config(PHI_3_MINI_4K | {"auto_map": {"AutoModelForCausalLM": "mine.Phi"}})
