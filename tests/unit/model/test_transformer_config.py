"""Which fused passes megatron-core is asked for, on a GPU with and without Transformer Engine."""

import dataclasses

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.model import transformer_config as module

ROPE = "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb"


@pytest.fixture
def fusions(monkeypatch):
    """The switches of megatron-core's configuration, as if these were installed."""

    def built(
        layers: str, *, experts: int = 0, swiglu: object = None, on_gpu: bool = True, **model
    ):
        monkeypatch.setattr(module, "transformer_engine_swiglu", lambda: swiglu)
        monkeypatch.setattr(ROPE, lambda *_, **__: None)
        config = Config()
        config.model = dataclasses.replace(config.model, experts=experts, **model)
        made = module.transformer_config(config, on_gpu=on_gpu, layers=layers)
        return {
            "rope": made.apply_rope_fusion,
            "engine_swiglu": made.use_te_activation_func,
            "compiled_swiglu": made.bias_activation_fusion,
        }

    return built


def test_transformer_engines_passes_are_used_with_its_layers(fusions):
    assert fusions("transformer_engine", swiglu=object) == {
        "rope": True,
        "engine_swiglu": True,
        "compiled_swiglu": False,
    }


def test_experts_and_old_versions_take_the_compiled_swiglu(fusions):
    expected = {"rope": True, "engine_swiglu": False, "compiled_swiglu": True}
    assert fusions("transformer_engine", swiglu=object, experts=4) == expected
    assert fusions("transformer_engine", swiglu=None) == expected


def test_torch_layers_and_the_cpu_take_none_of_them(fusions):
    assert fusions("torch") == {"rope": False, "engine_swiglu": False, "compiled_swiglu": True}
    assert fusions("torch", on_gpu=False) == dict.fromkeys(
        ("rope", "engine_swiglu", "compiled_swiglu"), False
    )


@pytest.mark.parametrize(
    "parts",
    [
        dict(activation="gelu"),
        dict(activation="gelu_tanh"),
        dict(gated_feed_forward=False, activation="gelu", feed_forward_bias=True),
        dict(gated_feed_forward=False),
    ],
)
@pytest.mark.parametrize("layers", ["torch", "transformer_engine"])
def test_no_pass_of_another_activation_is_taken(fusions, layers, parts):
    """megatron-core's fused GELU, with or without a gate, is the tanh approximation whichever was
    asked for.
    """
    found = fusions(layers, swiglu=object, **parts)
    assert not found["engine_swiglu"]
    assert not found["compiled_swiglu"]
