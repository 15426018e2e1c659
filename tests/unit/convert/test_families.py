"""What every family of the registry says is complete: settings that it does not name are refused,
and its table names every tensor of the models that it expresses.
"""

from dataclasses import replace

import pytest

from megatron_slm.config.architecture import (
    ARCHITECTURE,
    EXPERTS,
    ROPE_NUMBERS,
    WINDOWS,
    architecture,
)
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families import registry
from megatron_slm.convert.families.registry import FAMILIES, family_for
from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.table import entries

CONTEXT = (
    (EXPERTS, {"experts": 4}),
    ((*WINDOWS, "rope_base_windowed"), {"attention_window_tokens": 8}),
    (("learned_positions",), {"position_embedding": "learned"}),
    (("qk_norm_over",), {"qk_norm": True}),
)
"""Settings without which others have no effect."""


def _another(name, value):
    """A value that the setting does not have by itself, and that another one may have."""
    if name == "rope_scaling":
        return "linear"
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"not {value}"
    if isinstance(value, list):
        return [1]
    return value + 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_setting_that_a_family_does_not_name_is_an_obstacle(family):
    plain = ModelConfig(**family.fixed)
    for name in ARCHITECTURE:
        if name in family.free or name in ROPE_NUMBERS:
            continue  # numbers of a rotary scaling have an effect with that scaling alone
        given = {name: _another(name, getattr(plain, name))}
        for names, context in CONTEXT:
            given = (context if name in names else {}) | given
        model = replace(plain, **given)
        if name not in architecture(model):  # a rotary embedding's, of a family that has none
            assert family.fixed["position_embedding"] == "learned"
            continue
        assert f"model.{name} is" in " ".join(family.obstacles(model)), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_table_names_every_tensor_of_its_models(family):
    wanted = {"vocabulary_size": 64, **family.fixed}
    for name in ("experts", "attention_window_tokens"):
        if name in family.free:
            wanted[name] = 4
    if "embedding_scale" in family.free:
        wanted["embedding_scale"] = ModelConfig().hidden_size ** 0.5
    model = ModelConfig(**wanted)
    assert not [*family.obstacles(model)]
    table = entries(Geometry.from_model(model), family.table)
    theirs = [name for entry in table for name in entry.theirs]
    assert len(theirs) == len(set(theirs)) >= len(table)


def test_what_no_family_expresses_is_refused(monkeypatch):
    model = ModelConfig(attention_window_tokens=8, full_attention_layers=[0], experts=4)
    with pytest.raises(ValueError, match="all layers have the window"):
        family_for(model)
    model = ModelConfig(qkv_bias=True, experts=4, renormalize_experts=False)
    with pytest.raises(ValueError, match="shared expert"):
        family_for(model)
    monkeypatch.setattr(registry, "_gap", lambda model: "")
    with pytest.raises(ValueError, match="nearest: .*model.qkv_bias is true, and always false in"):
        family_for(model)


def test_a_family_is_chosen_by_its_name():
    model = ModelConfig(attention_window_tokens=8)
    assert family_for(model).model_type == "mistral"
    assert family_for(model, "phi3").model_type == "phi3"
    with pytest.raises(ValueError, match=r"no llama: model\.attention_window_tokens is 8, and alw"):
        family_for(model, "llama")
