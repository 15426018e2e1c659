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


@pytest.mark.parametrize(
    "published, parameters, sequence_length",
    [(PYTHIA_410M, 405_334_016, 2048), (GPT_2, 124_439_808, 1024)],
    ids=["pythia-410m", "gpt2"],
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
