"""The name table against Hugging Face's own classes: every tensor has a place, and both directions
undo each other exactly.
"""

import pytest
import torch

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.registry import family_for, family_of
from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.hf_config import huggingface_config
from megatron_slm.convert.hf_settings import model_config
from megatron_slm.convert.names import FromHuggingface, to_huggingface
from megatron_slm.convert.tensors import our_tensors

SIZES = dict(
    layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    attention_heads=4,
    head_size=16,
    vocabulary_size=101,
    pad_vocabulary_to_multiple_of=64,
)
LLAMA = family_of("llama")
VARIANTS = {
    "llama, multi-head": {},
    "llama, grouped": {"query_groups": 2},
    "llama, tied": {"query_groups": 1, "tied_embeddings": True},
    "qwen2": {"query_groups": 2, "qkv_bias": True},
    "qwen3": {"query_groups": 2, "qk_norm": True, "tied_embeddings": True},
    "mixtral": {"query_groups": 2, "experts": 3},
    "qwen3-moe": {"query_groups": 2, "qk_norm": True, "experts": 4, "renormalize_experts": False},
    "llama 3.1": {
        "rope_scaling": "llama3",
        "rope_scaling_factor": 4.0,
        "rope_original_sequence_length": 32,
        "rope_high_frequency_factor": 8.0,
    },
}


def random_state(geometry: Geometry) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {
        tensor.name: torch.randn(tensor.shape, generator=generator)
        for tensor in our_tensors(geometry)
    }
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in state:
            state[name][geometry.vocabulary_size :] = 0.0
    return state


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact_and_fits_the_class_of_transformers(variant):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = ModelConfig(**SIZES, **VARIANTS[variant])
    geometry = Geometry.from_model(model)
    state = random_state(geometry)
    family = family_for(model)
    theirs = dict(to_huggingface(state, geometry, family))
    config = huggingface_config(model, 64, None, "fp32")
    assert theirs["model.embed_tokens.weight"].shape == (101, 32)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in peer.state_dict().items()
        if name != "lm_head.weight" or not geometry.tied
    }
    if (
        not geometry.experts
    ):  # transformers 5 fuses the experts it reads; test_huggingface.py compares what they compute
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == expected

    back = FromHuggingface(theirs, geometry, family)
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    read = model_config(config)[0]
    assert (
        Geometry.from_model(ModelConfig(**{**vars(read), "pad_vocabulary_to_multiple_of": 64}))
        == geometry
    )
    for name in [
        name
        for name in vars(model)
        if name.startswith("rope") or (model.experts and "expert" in name)
    ]:
        assert getattr(read, name) == getattr(model, name), name


def test_qkv_rows_are_interleaved_by_query_group():
    """Megatron-core's order, spelt out by hand: per group its query heads, then its key head, then
    its value head.
    """
    geometry = Geometry.from_model(ModelConfig(**{**SIZES, "query_groups": 2}))
    rows = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    number = {row: i for i, row in enumerate(rows)}
    fused = (
        torch.tensor([number[row] for row in rows])
        .repeat_interleave(16)[:, None]
        .expand(-1, 32)
        .float()
    )
    state = random_state(geometry) | {"decoder.layers.1.self_attention.linear_qkv.weight": fused}
    theirs = dict(to_huggingface(state, geometry, LLAMA))
    for part, heads in {
        "q": ["q0", "q1", "q2", "q3"],
        "k": ["k0", "k1"],
        "v": ["v0", "v1"],
    }.items():
        weight = theirs[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert weight[::16, 0].tolist() == [number[head] for head in heads]


def test_what_does_not_fit_is_named():
    geometry = Geometry.from_model(ModelConfig(**SIZES))
    state = random_state(geometry)
    without = {
        name: tensor for name, tensor in state.items() if name != "decoder.final_layernorm.weight"
    }
    with pytest.raises(ValueError, match="lacks decoder.final_layernorm.weight"):
        dict(to_huggingface(without, geometry, LLAMA))
    with pytest.raises(
        ValueError, match="has decoder.layers.0.surprise, which this model has no place for"
    ):
        dict(to_huggingface(state | {"decoder.layers.0.surprise": torch.ones(1)}, geometry, LLAMA))
    with pytest.raises(ValueError, match=r"linear_fc2.weight has shape \(32, 24\)"):
        dict(
            to_huggingface(
                state | {"decoder.layers.0.mlp.linear_fc2.weight": torch.ones(32, 24)},
                geometry,
                LLAMA,
            )
        )
    theirs = dict(to_huggingface(state, geometry, LLAMA))
    with pytest.raises(ValueError, match="q_proj.bias, which"):
        FromHuggingface(
            theirs | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, geometry, LLAMA
        )


def test_derived_buffers_of_older_exports_are_passed_over():
    geometry = Geometry.from_model(ModelConfig(**SIZES, tied_embeddings=True))
    theirs = dict(to_huggingface(random_state(geometry), geometry, LLAMA))
    theirs |= {
        "lm_head.weight": theirs["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    assert "output_layer.weight" not in set(FromHuggingface(theirs, geometry, LLAMA))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
            "rotary scaling 'longrope'.*implemented are linear, llama3 and yarn",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe'; expected one of .*mixtral"),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 8,
                "decoder_sparse_step": 2,
            },
            "dense layers among",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_models_that_cannot_be_expressed_are_refused(change, named):
    config = huggingface_config(ModelConfig(**SIZES), 64, None, "fp32")
    with pytest.raises(ValueError, match=named):
        model_config(config | change)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"qkv_bias": True}, "shared expert"),
        ({"renormalize_experts": False}, "without model.qk_norm"),
    ],
)
def test_mixtures_without_an_architecture_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        huggingface_config(ModelConfig(**SIZES, experts=4, **settings), 64, None, "fp32")
