"""Values of config.json that are legal JSON and no model: each is refused under its own key, or is
not set; and what an export says where an id is not known.
"""

import json

import pytest

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.registry import family_for, family_of
from megatron_slm.convert.hf_config import huggingface_config
from megatron_slm.convert.hf_settings import model_config, read_by_transformers
from tests.unit.convert.matrix_cases import OLMO3, WINDOWED
from tests.unit.convert.small_models import EXPERTS, LACKING, SIZES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def given(model_type, **changes):
    """A config.json without keys of the rotary embedding but for `changes`."""
    lacking = {*LACKING.get(model_type, ()), "rope_parameters"}
    sizes = {key: value for key, value in SIZES.items() if key not in lacking}
    config = {"model_type": model_type, **sizes, **EXPERTS.get(model_type, {}), **changes}
    return json.loads(json.dumps(config))


REFUSED = {
    "a factor of YaRN that makes every score 0": (
        ("llama", {"rope_scaling": YARN | {"attention_factor": 0}}),
        "rope_scaling has attention_factor 0; expected above 0",
    ),
    "a number as text": (
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}),
        "rope_scaling has factor '2'; expected a number",
    ),
    "a base as a list": (("llama", {"rope_theta": [300.0]}), "rope_theta [300.0]; expected a n"),
    "a base as text": (("gpt_neox", {"rotary_emb_base": "a"}), "rotary_emb_base 'a'; expected a"),
    "a base of windows as text": (
        ("gemma3_text", {"rope_local_base_freq": "a"}),
        "rope_local_base_freq 'a'; expected a number",
    ),
    "a base that is null in the new place": (
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
        "rope_parameters has rope_theta null",
    ),
    "a turned part that is null": (
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": None}}),
        "rope_parameters has partial_rotary_factor null",
    ),
    "a window of nothing": (("mistral", {"sliding_window": 0}), "sliding_window 0; expected at"),
    "scores divided by nothing": (
        ("gemma3_text", {"query_pre_attn_scalar": 0}),
        "query_pre_attn_scalar 0; expected above 0",
    ),
    "no experts": (("mixtral", {"num_local_experts": 0}), "0 experts (num_experts, num_local"),
    "a setting under our name and theirs": (
        ("qwen2", {"num_key_value_heads": 3}),
        "it must divide model.attention_heads (4) (in config.json: num_key_value_heads)",
    ),
    "the same of another family": (("gpt_neox", {"rotary_pct": 2.0}), "in config.json: rotary_pct"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_is_none_is_refused_under_its_key(case):
    (model_type, changes), said = REFUSED[case]
    with pytest.raises(ValueError, match="cannot be expressed here") as refusal:
        model_config(given(model_type, **changes))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "model_type, keys",
    [
        ("gpt_neox", {"rotary_pct": None, "rotary_emb_base": None}),
        ("gemma3_text", {"rope_local_base_freq": None, "rope_theta": None}),
    ],
)
def test_a_null_of_the_rotary_embedding_is_not_set(model_type, keys):
    sizes = {"hidden_size": 64}  # a quarter of a head is an even number of channels
    assert model_config(given(model_type, **sizes, **keys)) == model_config(
        given(model_type, **sizes)
    )


def test_windows_in_every_layer_have_the_only_rotary_embedding():
    """Also where that of no layer is another one, so that the model goes back as what it was."""
    rope = OLMO3["rope_parameters"] | {WINDOWED: {"rope_type": "default", "rope_theta": 100.0}}
    model, _ = model_config(
        given("olmo3", sliding_window=7, layer_types=[WINDOWED] * 2, rope_parameters=rope)
    )
    assert (model.rope_base, model.rope_base_windowed) == (100.0, 0.0)
    assert model.rope_scaling == "none"
    assert family_for(model).model_type == "olmo3"


@pytest.mark.parametrize("model_type", ["smollm3", "phi3"])
def test_an_id_that_is_not_known_is_not_the_default_of_the_class(model_type):
    """Their padding is beyond this vocabulary: transformers could not build the model."""
    model = ModelConfig(vocabulary_size=101)
    config = huggingface_config(model, 64, None, "fp32", family=family_of(model_type))
    theirs = read_by_transformers(config)
    assert theirs.pad_token_id is None
    assert theirs.bos_token_id is None
