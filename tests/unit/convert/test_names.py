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
from tests.unit.convert.families import NEOX

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
    "llama, biases": {
        "query_groups": 2,
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
    },
    "gpt-neox": NEOX | {"head_size": 8},
    "gpt-2": {
        **NEOX,
        "head_size": 8,
        "rope_fraction": 1.0,
        "parallel_residual": False,
        "activation": "gelu_tanh",
        "position_embedding": "learned",
        "learned_positions": 64,
        "tied_embeddings": True,
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

    model = ModelConfig(**SIZES | VARIANTS[variant])
    geometry = Geometry.from_model(model)
    state = random_state(geometry)
    family = family_for(model)
    theirs = dict(to_huggingface(state, geometry, family))
    config = huggingface_config(model, 64, None, "fp32")
    assert next(iter(theirs.values())).shape == (101, 32), "rows of padding stay here"
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    # What version 5 of transformers calls lm_head in memory is embed_out in the files of GPT-NeoX.
    head = "embed_out.weight" if family.model_type == "gpt_neox" else "lm_head.weight"
    expected = {
        name.replace("lm_head.weight", head): tuple(tensor.shape)
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


def test_gpt_neox_keeps_the_rows_of_its_heads_and_gpt_2_stacks_and_transposes_them():
    """Spelt out by hand: in a checkpoint of ours a head's query, key and value stand together."""
    sizes = SIZES | NEOX | {"head_size": 8}
    geometry = Geometry.from_model(ModelConfig(**sizes))
    fused = torch.arange(96.0)[:, None].expand(96, 32) + torch.arange(32) / 100
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    theirs = dict(
        to_huggingface(random_state(geometry) | {name: fused}, geometry, family_of("gpt_neox"))
    )
    assert torch.equal(theirs["gpt_neox.layers.1.attention.query_key_value.weight"], fused)
    learned = {"rope_fraction": 1.0, "position_embedding": "learned", "learned_positions": 8}
    geometry = Geometry.from_model(ModelConfig(**sizes | learned))
    theirs = dict(
        to_huggingface(random_state(geometry) | {name: fused}, geometry, family_of("gpt2"))
    )
    stacked = theirs["transformer.h.1.attn.c_attn.weight"]
    rows = [24 * head + 8 * part for part in range(3) for head in range(4)]
    assert stacked[0, ::8].tolist() == rows
    assert torch.equal(stacked[:, 0], torch.arange(32) / 100)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_older_files_of_gpt_neox_and_gpt_2(kind):
    """Masks of attention beside the weights; of GPT-2 the body alone, without `transformer.`."""
    settings = SIZES | VARIANTS["gpt-neox" if kind == "gpt_neox" else "gpt-2"]
    geometry, family = Geometry.from_model(ModelConfig(**settings)), family_of(kind)
    state = random_state(geometry)
    theirs = dict(to_huggingface(state, geometry, family))
    place = "gpt_neox.layers.0.attention." if kind == "gpt_neox" else "transformer.h.0.attn."
    theirs |= {place + "bias": torch.ones(1), place + "masked_bias": torch.ones(1)}
    stored = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    back = FromHuggingface(stored, geometry, family)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    if kind == "gpt2":
        twice = stored | {"transformer.wte.weight": theirs["transformer.wte.weight"]}
        with pytest.raises(ValueError, match="wte.weight under another name too"):
            FromHuggingface(twice, geometry, family)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "opt"}, "model_type 'opt'"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 8.0}},
            "rotary scaling 'proportional'.*implemented are linear, llama3, yarn, dynamic and long",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope lacks short_factor"),
        (
            {"model_type": "olmo3", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rotary scaling 'dynamic', which is not implemented in a olmo3",
        ),
        ({"model_type": "mistral", "attention_bias": True}, "this family has no biases in"),
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


@pytest.mark.parametrize(
    "kind, change, named",
    [
        ("gpt-neox", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'; expected one of gelu"),
        (
            "gpt-neox",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "turned part of a head is given as 0.25 and as 0.5",
        ),
        ("gpt-neox", {"rope_theta": 5.0}, "rope_theta 5.0: nothing here reads it"),
        (
            "gpt-neox",
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "model.rope_fraction: got 0.25 with rope_scaling yarn",
        ),
        ("gpt-2", {"scale_attn_weights": False}, "scale_attn_weights false"),
        ("gpt-2", {"scale_attn_by_inverse_layer_idx": True}, "by the layer's number"),
        ("gpt-2", {"activation_function": "tanh"}, "activation_function 'tanh'"),
    ],
)
def test_what_gpt_neox_and_gpt_2_have_and_we_do_not_is_refused(kind, change, named):
    config = huggingface_config(ModelConfig(**SIZES | VARIANTS[kind]), 64, None, "fp32")
    assert model_config(config)[1] == 64
    with pytest.raises(ValueError, match=named):
        model_config(config | change)
