"""What only the torch-native layers compute makes device.layers auto mean these."""

import pytest

from megatron_slm.config.layer_engine import torch_only_settings
from megatron_slm.config.schema import Config

NEEDS = {
    "data.document_policy": {"data": {"document_policy": "isolated"}},
    "model.norm_placement": {"model": {"norm_placement": "both"}},
    "model.qk_norm_over": {"model": {"qk_norm": True, "qk_norm_over": "all_heads"}},
    "model.zero_centered_norms": {"model": {"zero_centered_norms": True}},
    "model.rope_base_windowed": {"model": {"rope_base_windowed": 500.0}},
}


def configuration(sections: dict[str, dict]) -> Config:
    config = Config()
    for section, values in sections.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize("setting", NEEDS)
def test_auto_means_torch(setting, monkeypatch):
    from megatron_slm.model import build

    monkeypatch.setattr(build, "has_transformer_engine", lambda: True)
    config = configuration(NEEDS[setting])
    assert build.resolve_layers(Config(), on_gpu=True) == "transformer_engine"
    assert build.resolve_layers(config, on_gpu=True) == "torch"
    assert [each.setting for each in torch_only_settings(config)] == [setting]


def test_a_setting_without_effect_is_no_reason():
    assert not torch_only_settings(configuration({"model": {"qk_norm_over": "all_heads"}}))
