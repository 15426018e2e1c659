"""Stretched rotary frequencies against transformers' own, and against the plain decoder's."""

import dataclasses

import pytest
import torch

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.rope import rope_scaling
from megatron_slm.model.rope import attention_scale, scaled_frequencies
from megatron_slm.testing.plain_rope import frequencies

LENGTH = 20000
LLAMA_3_1 = dict(rope_base=500000.0, rope_scaling="llama3", rope_scaling_factor=8.0)
SETTINGS = {
    "linear": dict(rope_scaling="linear", rope_scaling_factor=4.0),
    "llama 3.1": LLAMA_3_1,
    "llama 3.2": LLAMA_3_1 | {"rope_scaling_factor": 32.0},
    "yarn": dict(
        rope_base=1e6,
        rope_scaling="yarn",
        rope_scaling_factor=4.0,
        rope_original_sequence_length=32768,
    ),
    "yarn, every number": dict(
        rope_scaling="yarn",
        rope_scaling_factor=16.0,
        rope_original_sequence_length=512,
        rope_beta_fast=20.0,
        rope_beta_slow=2.0,
        rope_attention_factor=1.5,
    ),
    "dynamic": dict(rope_scaling="dynamic", rope_scaling_factor=2.0),
    "longrope, beyond": dict(
        rope_scaling="longrope",
        rope_scaling_factor=32.0,
        rope_original_sequence_length=4096,
        rope_short_factors=[1.05] * 64,
        rope_long_factors=list(range(1, 65)),
    ),
    "longrope, within": dict(
        rope_scaling="longrope",
        rope_original_sequence_length=LENGTH,
        rope_short_factors=[1.0, 1.1, 1.3, 1.6] * 16,
        rope_long_factors=[9.0] * 64,
        rope_attention_factor=1.19,
    ),
    # Both bounds are the first channel.
    "yarn, a step": dict(
        rope_scaling="yarn", rope_scaling_factor=2.0, rope_original_sequence_length=6
    ),
    "unlike megatron-core's constants": LLAMA_3_1
    | {
        "rope_original_sequence_length": 1000,
        "rope_low_frequency_factor": 0.5,
        "rope_high_frequency_factor": 16.0,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = dataclasses.replace(ModelConfig(hidden_size=512, attention_heads=4), **SETTINGS[name])
    plain_D = 1.0 / (model.rope_base ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    ours_D = scaled_frequencies(plain_D, model, LENGTH)
    scaling = rope_scaling(model)
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters=scaling | {"rope_theta": model.rope_base},
    )
    compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    theirs_D, factor = compute(config, torch.device("cpu"), seq_len=LENGTH)
    scale = attention_scale(model)
    assert (scale or 128**-0.5) == pytest.approx(factor**2 / 128**0.5, rel=1e-12)
    assert not torch.equal(theirs_D, plain_D)
    torch.testing.assert_close(ours_D, theirs_D, rtol=1e-6, atol=0)
    by_hand_D = torch.tensor(frequencies(model, 128, LENGTH))
    torch.testing.assert_close(ours_D, by_hand_D, rtol=1e-6, atol=0)
