"""A setting of a model is its architecture or a choice of the run; the first kind is compared."""

from dataclasses import fields, replace

import pytest

from megatron_slm.config.architecture import (
    ARCHITECTURE,
    RUN_CHOICES,
    architecture,
    architecture_differences,
)
from megatron_slm.config.schema import ModelConfig

# A model in which every field has an effect, and another value of each.
MODEL = ModelConfig(
    query_groups=2,
    head_size=64,
    vocabulary_size=500,
    rope_scaling="llama3",
    qk_norm=True,
    experts=4,
    attention_window_tokens=128,
)
OTHER = {
    "layers": 5,
    "hidden_size": 128,
    "ffn_hidden_size": 512,
    "activation": "gelu",
    "gated_feed_forward": False,
    "attention_heads": 2,
    "query_groups": 1,
    "head_size": 32,
    "attention_scale_size": 128.0,
    "vocabulary_size": 501,
    "attention_window_tokens": 64,
    "full_attention_layers": [1],
    "position_embedding": "learned",
    "learned_positions": 1024,
    "rope_base_windowed": 5000.0,
    "layers_without_rope": [3],
    "rope_base": 500000.0,
    "rope_scaling": "none",
    "rope_fraction": 0.5,
    "rope_scaling_factor": 2.0,
    "rope_original_sequence_length": 4096,
    "rope_low_frequency_factor": 2.0,
    "rope_high_frequency_factor": 8.0,
    "rope_beta_fast": 16.0,
    "rope_beta_slow": 2.0,
    "rope_attention_factor": 1.5,
    "rope_short_factors": [1.5],
    "rope_long_factors": [2.5],
    "normalization": "layernorm",
    "norm_epsilon": 1e-6,
    "parallel_residual": True,
    "tied_embeddings": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "embedding_scale": 16.0,
    "norm_placement": "after",
    "zero_centered_norms": True,
    "qk_norm": False,
    "qk_norm_over": "all_heads",
    "experts": 0,
    "experts_per_token": 1,
    "renormalize_experts": False,
    "from_checkpoint": "runs/base",
    "pad_vocabulary_to_multiple_of": 64,
    "load_balancing": "sequence",
    "load_balancing_coefficient": 0.0,
    "router_z_loss_coefficient": 0.1,
    "initialization_std": 0.01,
    "dropout": 0.1,
    "recompute": "full",
}


def test_every_setting_is_architecture_or_a_choice_of_the_run():
    """A new field has to be put into one of the two, so that nobody forgets to compare it."""
    named = [*ARCHITECTURE, *RUN_CHOICES]
    assert sorted(named) == sorted(each.name for each in fields(ModelConfig))


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_another_architecture_is_seen(name):
    candidates = (  # some fields have no effect under llama3, or without a table
        MODEL,
        replace(MODEL, rope_scaling="yarn"),
        replace(MODEL, rope_scaling="longrope"),
        replace(MODEL, position_embedding="learned"),
    )
    model = next(each for each in candidates if name in architecture(each))
    found = architecture_differences(model, replace(model, **{name: OTHER[name]}))
    assert [(each.field, each.checkpoint, each.configuration) for each in found] == [
        (name, getattr(model, name), OTHER[name])
    ]


@pytest.mark.parametrize("name", RUN_CHOICES)
def test_a_choice_of_the_run_is_free(name):
    assert not architecture_differences(MODEL, replace(MODEL, **{name: OTHER[name]}))


def test_defaults_are_resolved_before_they_are_compared():
    written_out = ModelConfig(attention_heads=4, query_groups=4, head_size=64)
    assert not architecture_differences(ModelConfig(), written_out)
    assert not architecture_differences(written_out, ModelConfig())
    heads = architecture_differences(ModelConfig(), ModelConfig(attention_heads=8))
    assert [each.field for each in heads] == ["attention_heads"], "what follows from it is not said"


def test_an_own_base_of_windowed_layers_that_changes_nothing_is_none():
    windowed = ModelConfig(attention_window_tokens=8)
    same = replace(windowed, rope_base_windowed=windowed.rope_base)
    assert not architecture_differences(windowed, same)
    stretched = [replace(model, rope_scaling="linear") for model in (windowed, same)]
    found = architecture_differences(*stretched)
    assert [each.field for each in found] == ["rope_base_windowed"], "one of the two is unscaled"


def test_what_has_no_effect_in_the_checkpoint_is_not_compared():
    dense, mixture = ModelConfig(), ModelConfig(experts=8, experts_per_token=3)
    assert [each.field for each in architecture_differences(dense, mixture)] == ["experts"]
    assert {each.field for each in architecture_differences(mixture, dense)} == {
        "experts",
        "experts_per_token",
    }
    assert not architecture_differences(dense, ModelConfig(rope_scaling_factor=2.0))
    learned = ModelConfig(position_embedding="learned", learned_positions=512)
    assert not architecture_differences(learned, replace(learned, rope_base=500.0))
    assert [each.field for each in architecture_differences(learned, dense)] == [
        "position_embedding",
        "learned_positions",
    ]
