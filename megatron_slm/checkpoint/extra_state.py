"""The extra state of a layer: nothing, or what Transformer Engine keeps for fp8, which it stores as
a pickle in a tensor of bytes.

Transformer Engine unpickles those bytes as they are. Therefore they are read here as plain data
first, rebuilt from the parts of an fp8 state (a recipe, tensors of scales, plain variables), and
pickled again, so that Transformer Engine unpickles bytes that this program wrote.
"""

import collections
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_slm.checkpoint.weights_only import load_weights_only
from megatron_slm.files.inert_pickle import Record, load_inert

_RECIPES = "transformer_engine.common.recipe"
_RECIPE_NAMES = (
    "DelayedScaling",
    "Float8CurrentScaling",
    "Float8BlockScaling",
    "MXFP8BlockScaling",
    "MMParams",
    "QParams",
)
_FORMAT = f"{_RECIPES}.Format"
_FORMAT_VALUE = f"{_RECIPES}._FormatHelper"
# megatron-core's recipe of delayed scaling, which is Transformer Engine's with two fields more.
_CORE_RECIPE = "megatron.core.extensions.transformer_engine.TEDelayedScaling"
# How a pickle names a tensor's bytes: torch, and in its place megatron-core 0.19.2 in all processes
# that have imported it.
_STORAGES = (
    "torch.storage._load_from_bytes",
    "megatron.core.safe_globals.safe_load_from_bytes",
)
_TENSOR = "torch._utils._rebuild_tensor_v2"
_HOOKS = "collections.OrderedDict"
NAMES = frozenset(
    {
        *(f"{_RECIPES}.{name}" for name in _RECIPE_NAMES),
        _FORMAT,
        _FORMAT_VALUE,
        _CORE_RECIPE,
        *_STORAGES,
        _TENSOR,
        _HOOKS,
    }
)


def plain_extra_state(state: Any, path: Path) -> torch.Tensor | None:
    """The extra state as it may be given to a layer.

    `state`: None, or a uint8 tensor [bytes of a pickle].

    UnsafeFile when the pickle names anything but the parts of an fp8 state; ValueError when it is
    something else. Both name `path`.
    """
    if state is None:
        return None
    if type(state) is not torch.Tensor or state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError(
            f"{path}: a layer's extra state is {type(state).__name__}, expected nothing or a "
            "vector of bytes"
        )
    if state.numel() == 0:
        return state
    tree = load_inert(state.numpy().tobytes(), NAMES, path)
    try:
        made = _made(tree)
    except Exception as error:  # allowed names in an impossible structure
        raise ValueError(
            f"{path}: a layer's extra state is no fp8 state of Transformer Engine "
            f"({type(error).__name__}: {error})"
        ) from None
    return torch.frombuffer(bytearray(pickle.dumps(made)), dtype=torch.uint8)


def _made(node: Any) -> Any:
    """The real object that a tree of Records describes."""
    if isinstance(node, dict):
        return {_made(key): _made(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(map(_made, node))
    if not isinstance(node, Record):
        return node
    arguments = _made(node.args)
    if node.name == _HOOKS:
        return collections.OrderedDict()
    if node.name in _STORAGES:
        return load_weights_only(io.BytesIO(arguments[0]))
    if node.name == _TENSOR:
        return torch._utils._rebuild_tensor_v2(*arguments)
    return _recipe(node, arguments)


def _recipe(node: Record, arguments: tuple) -> Any:
    module, _, name = node.name.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if node.name in (_FORMAT, _FORMAT_VALUE):
        return kind(*arguments)
    made = kind.__new__(kind)
    made.__dict__.update(_made(node.state or {}))
    return made
