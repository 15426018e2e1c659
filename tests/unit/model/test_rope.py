"""Stretched rotary frequencies against transformers' own, and against the plain decoder's."""

import dataclasses

import pytest
import torch

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.rope import rope_scaling
from megatron_slm.model.rope import attention_scale, scaled_frequencies
from megatron_slm.testing.plain_rope import stretched

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
    ours_D = scaled_frequencies(plain_D, model)
    scaling = rope_scaling(model)
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters=scaling | {"rope_theta": model.rope_base},
    )
    theirs_D, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    scale = attention_scale(model)
    assert (scale or 128**-0.5) == pytest.approx(factor**2 / 128**0.5, rel=1e-12)
    assert not torch.equal(theirs_D, plain_D)
    torch.testing.assert_close(ours_D, theirs_D, rtol=1e-6, atol=0)
    by_hand_D = torch.tensor(
        [stretched(model.rope_base ** (-channel / 128), model) for channel in range(0, 128, 2)]
    )
    torch.testing.assert_close(ours_D, by_hand_D, rtol=1e-6, atol=0)
