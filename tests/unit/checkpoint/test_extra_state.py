"""Extra state of layers: Transformer Engine would unpickle it, so what it gets is made anew from
the parts of an fp8 state.
"""

import enum
import os
import pickle
import sys
import types
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_slm.checkpoint.extra_state import plain_extra_state
from megatron_slm.files.inert_pickle import UnsafeFile

RECIPES = "transformer_engine.common.recipe"
CORE_LAYERS = "megatron.core.extensions.transformer_engine"
CORE_GLOBALS = "megatron.core.safe_globals"


@pytest.fixture
def recipes(monkeypatch):
    """A stand-in for Transformer Engine's recipes, with the shapes of its own: a named tuple, an
    enum of them, a dataclass.
    """
    module = types.ModuleType(RECIPES)
    helper = namedtuple("_FormatHelper", "max_fwd max_bwd", module=RECIPES)
    formats = enum.Enum(
        "Format", {"E4M3": helper(448, 448), "HYBRID": helper(448, 57344)}, module=RECIPES
    )

    @dataclass
    class DelayedScaling:
        margin: int = 0
        fp8_format: formats = formats.HYBRID
        amax_history_len: int = 1024

    DelayedScaling.__module__ = RECIPES
    DelayedScaling.__qualname__ = "DelayedScaling"
    module._FormatHelper = helper
    module.Format = formats
    module.DelayedScaling = DelayedScaling
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, RECIPES, module)
    return module


def as_bytes(state) -> torch.Tensor:
    """As Transformer Engine's get_extra_state packs it."""
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def test_an_fp8_state_comes_through_whole(recipes):
    state = {
        "recipe": recipes.DelayedScaling(margin=2),
        "scale_fwd": torch.tensor([1.0, 2.0]),
        "amax_history_fwd": torch.arange(6.0).reshape(3, 2),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "name": "x"},
    }
    made = pickle.loads(plain_extra_state(as_bytes(state), Path("F")).numpy().tobytes())
    assert made["recipe"] == state["recipe"]
    assert made["extra_fp8_variables"] == state["extra_fp8_variables"]
    assert torch.equal(made["scale_fwd"], state["scale_fwd"])
    assert torch.equal(made["amax_history_fwd"], state["amax_history_fwd"])


def test_tensors_that_were_packed_under_megatron_core_0_19_come_through(monkeypatch):
    """It puts a function of its own in the place of torch's: into every pickle of a tensor."""

    def safe_load_from_bytes(content):
        raise AssertionError("what reads a file calls nothing that the file names")

    safe_load_from_bytes.__module__ = CORE_GLOBALS
    safe_load_from_bytes.__qualname__ = "safe_load_from_bytes"
    module = types.ModuleType(CORE_GLOBALS)
    module.safe_load_from_bytes = safe_load_from_bytes
    with monkeypatch.context() as patches:
        patches.setitem(sys.modules, CORE_GLOBALS, module)
        patches.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
        packed = as_bytes({"scale_fwd": torch.tensor([1.0, 2.0])})
    assert CORE_GLOBALS.encode() in packed.numpy().tobytes()
    made = pickle.loads(plain_extra_state(packed, Path("F")).numpy().tobytes())
    assert torch.equal(made["scale_fwd"], torch.tensor([1.0, 2.0]))


def test_megatron_cores_recipe_of_delayed_scaling_comes_through(recipes, monkeypatch):
    module = types.ModuleType(CORE_LAYERS)

    class TEDelayedScaling(recipes.DelayedScaling):
        pass

    TEDelayedScaling.__module__, TEDelayedScaling.__qualname__ = CORE_LAYERS, "TEDelayedScaling"
    module.TEDelayedScaling = TEDelayedScaling
    monkeypatch.setitem(sys.modules, CORE_LAYERS, module)
    state = {"recipe": TEDelayedScaling(margin=3), "scale_fwd": torch.tensor([1.0])}
    made = pickle.loads(plain_extra_state(as_bytes(state), Path("F")).numpy().tobytes())
    assert type(made["recipe"]) is TEDelayedScaling
    assert made["recipe"] == state["recipe"]


def test_no_state_stays_none():
    assert plain_extra_state(None, Path("F")) is None
    assert plain_extra_state(torch.empty(0, dtype=torch.uint8), Path("F")).numel() == 0


class Planted:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("deep", [False, True])
def test_code_in_it_is_refused_by_name(deep, recipes, tmp_path):
    planted = Planted(tmp_path / "ran")
    state = {"recipe": recipes.DelayedScaling(margin=planted)} if deep else planted
    with pytest.raises(UnsafeFile, match="^F: refused, because it names posix.mkdir"):
        plain_extra_state(as_bytes(state), Path("F"))
    assert not (tmp_path / "ran").exists()


class Nested:
    """A tensor's storage is a pickle in the pickle, which torch would load unrestricted."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_code_in_a_tensor_in_it_does_not_run(tmp_path):
    inner = tmp_path / "inner"
    torch.save(Planted(tmp_path / "ran"), inner, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="^F: a layer's extra state is no fp8 state"):
        plain_extra_state(as_bytes({"scale_fwd": Nested(inner.read_bytes())}), Path("F"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("state", ["text", torch.ones(3), torch.ones(2, 2, dtype=torch.uint8)])
def test_what_no_layer_stores_is_refused(state):
    with pytest.raises(ValueError, match="^F: a layer's extra state is"):
        plain_extra_state(state, Path("F"))
