"""Whole tensors out of a checkpoint folder: whatever the pieces, nothing but the model, one tensor
at a time.
"""

from dataclasses import replace

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.stored_state import FullState, stored_key, write_full_state
from megatron_slm.convert.tensors import our_tensors

GEOMETRY = Geometry.from_model(
    ModelConfig(
        layers=3,
        hidden_size=8,
        ffn_hidden_size=12,
        attention_heads=2,
        vocabulary_size=20,
        qkv_bias=True,
    )
)


def test_layers_are_stacked_under_megatron_cores_names():
    assert stored_key("decoder.layers.12.input_layernorm.weight") == (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (12,),
    )
    assert stored_key("decoder.layers.3.mlp.linear_fc2.weight") == (
        "decoder.layers.mlp.linear_fc2.weight",
        (3,),
    )
    assert stored_key("decoder.final_layernorm.weight") == ("decoder.final_layernorm.weight", ())


def test_experts_are_stacked_behind_layers_and_their_norm_keeps_its_name():
    assert stored_key("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight") == (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        (3, 7),
    )
    assert stored_key("decoder.layers.3.pre_mlp_layernorm.weight") == (
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        (3,),
    )
    assert stored_key("decoder.layers.3.pre_mlp_layernorm.weight", mixture=True) == (
        "decoder.layers.pre_mlp_layernorm.weight",
        (3,),
    )


@pytest.mark.parametrize(
    "geometry", [GEOMETRY, replace(GEOMETRY, experts=3)], ids=["dense", "experts"]
)
def test_written_tensors_are_read_back_and_asked_for_once(tmp_path, geometry):
    tensors = [*our_tensors(geometry)]
    state = {tensor.name: torch.randn(tensor.shape) for tensor in tensors}
    asked = []

    class Watched(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    write_full_state(
        Watched(state),
        {tensor.name: tensor.shape for tensor in tensors},
        GEOMETRY.layers,
        tmp_path,
        torch.float32,
    )
    assert sorted(asked) == sorted(state)
    back = FullState(tmp_path)
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_only_the_model_is_read(tmp_path):
    stored = {
        "decoder.final_layernorm.weight": torch.ones(8),
        "optimizer.exp_avg.decoder.final_layernorm.weight": torch.zeros(8),
        "random": torch.zeros(3),
    }
    dcp.save(stored, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(ValueError, match="metadata.json not found"):
        FullState(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    assert list(FullState(tmp_path)) == ["decoder.final_layernorm.weight"]
