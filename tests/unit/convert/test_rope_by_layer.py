"""OLMo 3 and Gemma 3: what their config.json says of two rotary embeddings is read as transformers
reads it, or refused by name; what of our models they cannot express.
"""

from dataclasses import replace

import pytest

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.registry import family_for, family_of
from megatron_slm.convert.hf_settings import model_config
from tests.unit.convert.matrix_cases import GEMMA3, OLMO3, SIZES

FULL = {"rope_type": "default", "rope_theta": 500.0}
WINDOWED = {"rope_type": "default", "rope_theta": 100.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


SETTINGS = {"olmo2": {}, "olmo3": OLMO3, "gemma3_text": GEMMA3}


def given(model_type: str, **changes) -> dict:
    """config.json of a small model; a key that is None is absent."""
    config = {"model_type": model_type, **SIZES, **SETTINGS[model_type], **changes}
    return {key: value for key, value in config.items() if value is not None}


REFUSED = {
    "flat": ("olmo3", {"rope_parameters": FULL}, "expected a mapping for each of full_attention"),
    "another kind of layer": (
        "olmo3",
        {"rope_parameters": {"full_attention": FULL, "linear_attention": FULL}},
        "expected a mapping for each of full_attention",
    ),
    "two bases": (
        "olmo3",
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": WINDOWED}},
        "rope_theta of full_attention and of sliding_attention differ (100.0 and 500.0)",
    ),
    "a base that transformers 5 takes for half of the layers": (
        "olmo3",
        {"rope_parameters": None, "rope_theta": 1000.0},
        "differ (1000.0 and 500000.0): an OLMo 3 has one",
    ),
    "stretched windows": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": FULL, "sliding_attention": FULL | YARN}},
        "rotary scaling 'yarn' of sliding_attention",
    ),
    "a kind that is not implemented": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": FULL | {"rope_type": "ntk"}}},
        "rotary scaling 'ntk' (rope_parameters of full_attention",
    ),
    "a kind that depends on the length": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": FULL | {"rope_type": "dynamic", "factor": 2.0}}},
        "rotary scaling 'dynamic', which is not implemented in a gemma3_text",
    ),
    "scaling said twice": (
        "gemma3_text",
        {"rope_scaling": YARN},
        "both rope_parameters of full_attention",
    ),
    "the base of windows said twice": (
        "gemma3_text",
        {"rope_local_base_freq": 200.0},
        "rope_local_base_freq is given as 200.0 and as 100.0",
    ),
    "a soft cap": ("gemma3_text", {"final_logit_softcapping": 30.0}, "soft caps (Gemma 2)"),
    "attention both ways": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "attention here is causal",
    ),
    "another activation": (
        "gemma3_text",
        {"hidden_activation": "silu"},
        "hidden_activation 'silu'; expected gelu_pytorch_tanh",
    ),
    "a key of other families": ("gemma3_text", {"hidden_act": "silu"}, "hidden_act 'silu'"),
    "biases": ("olmo2", {"attention_bias": True}, "attention_bias True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(case):
    model_type, changes, said = REFUSED[case]
    with pytest.raises(ValueError, match="cannot be expressed here") as refusal:
        model_config(given(model_type, **changes))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "model_type, said",
    [("gemma2", "soft caps"), ("gemma3", "text_config"), ("gpt", "expected one")],
)
def test_a_family_that_is_not_built_says_why(model_type, said):
    with pytest.raises(ValueError, match=said):
        family_of(model_type)


def test_keys_of_before_transformers_5_are_read():
    keys = {"rope_parameters": None, "rope_theta": 700.0, "rope_local_base_freq": 50.0}
    gemma, _ = model_config(given("gemma3_text", **keys))
    assert (gemma.rope_base, gemma.rope_base_windowed) == (700.0, 50.0)
    keys = {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": YARN}
    olmo, _ = model_config(given("olmo3", **keys))
    assert (olmo.rope_base, olmo.rope_base_windowed) == (500000.0, 500000.0)
    assert olmo.rope_scaling == "yarn"
    plain, _ = model_config(given("olmo3", **keys | {"rope_scaling": None}))
    assert plain.rope_base_windowed == 0.0, "one embedding for all layers"


def test_a_pattern_becomes_layers():
    gemma, _ = model_config(given("gemma3_text", layer_types=None, sliding_window_pattern=3))
    assert gemma.full_attention_layers == [2]


@pytest.mark.parametrize(
    "model_type, change, said",
    [
        ("olmo3", {"rope_base_windowed": 0.0}, "model.rope_base_windowed is 0"),
        ("olmo3", {"rope_base_windowed": 9.0}, "model.rope_base_windowed is 9.0, and always"),
        ("gemma3_text", {"embedding_scale": 1.0}, "model.embedding_scale is 1.0, and always"),
        ("gemma3_text", {"attention_scale_size": 10.5}, "model.attention_scale_size is 10.5"),
        ("gemma3_text", {"activation": "silu"}, "model.activation is silu"),
    ],
)
def test_what_a_family_cannot_express_is_said(model_type, change, said):
    model, _ = model_config(given(model_type))
    assert family_for(model).model_type == model_type
    said_by_family = " ".join(family_of(model_type).obstacles(replace(model, **change)))
    assert said in said_by_family


def test_no_windows_and_no_scaling_is_an_olmo_2():
    model = ModelConfig(
        vocabulary_size=101, norm_placement="after", qk_norm=True, qk_norm_over="all_heads"
    )
    assert family_for(model).model_type == "olmo2"
