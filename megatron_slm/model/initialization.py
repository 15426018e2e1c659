"""Initial weights that are the same in every parallel layout."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors
from megatron.core.transformer.module import MegatronModule

from megatron_slm.config.schema import ModelConfig


def initialize_weights(chunks: Sequence[MegatronModule], seed: int, model: ModelConfig) -> None:
    """Draw weights that depend on the seed and the parameter's name only.

    Normal with std model.initialization_std; matrices that write into the residual stream
    (attention output, MLP output) with std / sqrt(2 * layers), as GPT-2 and megatron-core do; norm
    weights 1, or 0 with model.zero_centered_norms; biases 0.
    Every full matrix is drawn from its own generator and cut to this rank's part, which costs the
    size of one full matrix for a moment.
    """
    sharded = {place: chunk.sharded_state_dict() for place, chunk in enumerate(chunks)}
    apply_factories(sharded)
    tensors, _ = extract_sharded_tensors(sharded)
    for tensor in _leaves(tensors):
        _initialize(tensor, seed, model)


def _leaves(tree: dict | list) -> Iterator[ShardedTensor]:
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, (dict, list)):
            yield from _leaves(value)
        elif isinstance(value, ShardedTensor):
            yield value


@torch.no_grad()
def _initialize(tensor: ShardedTensor, seed: int, model: ModelConfig) -> None:
    if tensor.key.endswith("bias"):  # those of norms too
        tensor.data.zero_()
        return
    if "layer_norm" in tensor.key or "layernorm" in tensor.key:
        tensor.data.fill_(0.0 if model.zero_centered_norms else 1.0)
        return
    stacked = tensor.prepend_axis_num
    layer = tensor.global_offset[:stacked]
    digest = hashlib.sha256(f"{seed}/{tensor.key}/{layer}".encode()).digest()
    device = tensor.data.device
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "little"))
    std = model.initialization_std
    if tensor.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std = std / math.sqrt(2 * model.layers)
    full = torch.empty(tensor.global_shape[stacked:], dtype=torch.float32, device=device)
    full.normal_(0.0, std, generator=generator)
    starts = tensor.global_offset[stacked:]
    here = [
        slice(start, start + size) for start, size in zip(starts, tensor.local_shape, strict=True)
    ]
    tensor.data.copy_(full[tuple(here)])
