"""Optimizer state by parameter name: the same in every parallel layout, with and without the
distributed optimizer.

megatron-core 0.16.1 cannot resume its distributed optimizer over torch's AdamW: its state dict
asserts on a fresh optimizer and lets parameters share one step tensor, and its reshardable format
fails on "step". Nor can its two optimizers read each other's checkpoints. So the moments of each
parameter (and its fp32 main weight, under bf16) are saved here under the parameter's own global
name and shape; the slices of the distributed optimizer are put together for saving and cut again
on load.

Cost while saving: 8 bytes of host memory per parameter of this rank's model shard (12 under bf16),
and one reduction of them over the data-parallel ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Slot:
    """One model parameter, and the optimizer tensors of the part of it that this rank updates."""

    parameter: torch.nn.Parameter
    main: Tensor | None
    """The weights that are updated; None: this data-parallel rank updates no element of it."""
    inner: torch.optim.Optimizer
    start: int = 0
    """The first element of the parameter that this rank updates."""
    data_parallel_group: dist.ProcessGroup | None = None
    """The ranks that share the parameter; None: this rank updates all of it."""

    def tensor(self, name: str) -> Tensor:
        """The moment `name`, or the main weights ("param"), of the part that this rank updates.

        A moment is allocated as the optimizer's first step would allocate it.
        """
        assert self.main is not None
        if name == "param":
            return self.main
        state = self.inner.state[self.main]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(self.main, dtype=torch.float32)
        return state[name]


@dataclass(frozen=True)
class Placement:
    """Where an entry of the optimizer's state dict belongs."""

    key: str
    slot: _Slot
    name: str
    """A moment, or "param"."""


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """megatron-core's optimizers of dense and of expert weights, without those of no weights."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _slots(optimizer: MegatronOptimizer) -> Iterator[_Slot]:
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            for buffer in part.buffers:
                for parameter in buffer.param_index_map:
                    yield _distributed_slot(part, parameter)
        elif hasattr(part, "fp32_from_float16_groups"):
            for models, mains in zip(
                part.float16_groups + part.fp32_from_fp32_groups,
                part.fp32_from_float16_groups + part.fp32_from_fp32_groups,
                strict=True,
            ):
                for parameter, main in zip(models, mains, strict=True):
                    yield _Slot(parameter, main, part.optimizer)
        else:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield _Slot(parameter, parameter, part.optimizer)


def _distributed_slot(part: Any, parameter: torch.nn.Parameter) -> _Slot:
    buffer_index, dtype, bucket = part.model_param_gbuf_map.get(parameter, (None, None, None))
    ranges = {}
    if buffer_index is not None:
        ranges = part.gbuf_ranges[buffer_index][dtype][bucket]["param_map"]
    if parameter not in ranges:
        return _Slot(parameter, None, part.optimizer, data_parallel_group=part.data_parallel_group)
    group, order = part.model_param_group_index_map[parameter]
    return _Slot(
        parameter,
        part.optimizer.param_groups[group]["params"][order],
        part.optimizer,
        ranges[parameter]["param"].start,
        part.data_parallel_group,
    )


def adam_steps(optimizer: MegatronOptimizer) -> int:
    """How many updates the optimizer has made.

    torch keeps the number per parameter, fused Adams per group.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups if getattr(part, "optimizer", None) else []:
            if "step" in group and group["params"]:
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state.get(parameter, {}):
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, for_loading: bool
) -> tuple[dict[str, Any], list[Placement]]:
    """The full tensors of every parameter of this rank's model shard, by global name.

    `for_loading` allocates without gathering. Give the placements and the loaded dict to
    `take_loaded_state`.
    """
    extracted, _ = extract_sharded_tensors_and_factories(model_state)
    described = {id(sharded.data): sharded for sharded in nested_values(extracted)}
    tensors: dict[str, Any] = {}
    placements = []
    for index, slot in enumerate(_slots(optimizer)):
        sharded = described.get(id(slot.parameter))
        if sharded is None:
            raise RuntimeError(
                "a parameter of the optimizer is not in the model's state dict; take it from the "
                "unwrapped model with keep_vars"
            )
        has_main = slot.parameter.dtype != torch.float32
        for name in (*MOMENTS, "param") if has_main else MOMENTS:
            full = torch.zeros(
                slot.parameter.shape,
                dtype=torch.float32,
                device="cpu" if slot.data_parallel_group is None else slot.parameter.device,
            )
            if not for_loading:
                full = _assembled(slot, name, full)
            key = f"{index}.{name}"
            tensors[key] = _named_like(sharded, full, f"optimizer.{name}")
            placements.append(Placement(key, slot, name))
    return tensors, placements


def _assembled(slot: _Slot, name: str, full: Tensor) -> Tensor:
    """The tensor of the whole parameter: this rank copies its slice into `full`, which is zero, and
    one sum adds the slices of the other data-parallel ranks.
    """
    if slot.main is not None:
        part = slot.tensor(name)
        full.view(-1)[slot.start : slot.start + part.numel()].copy_(part.detach().view(-1))
    if slot.data_parallel_group is not None:
        dist.all_reduce(full, group=slot.data_parallel_group)
    return full.cpu()


def _named_like(
    sharded: ShardedTensor | ShardedTensorFactory, tensor: Tensor, prefix: str
) -> ShardedTensor | ShardedTensorFactory:
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, key=f"{prefix}.{sharded.key}", data=tensor)
    return make_sharded_optimizer_tensor(sharded, tensor, prefix)


def take_loaded_state(
    placements: list[Placement], loaded: dict[str, Tensor], adam_steps: int
) -> None:
    """Copy loaded full tensors into the optimizer's own (sliced) ones, and set the number of
    updates wherever the optimizer keeps it.
    """
    for placement in placements:
        slot = placement.slot
        if slot.main is None:
            continue
        target = slot.tensor(placement.name)
        part = loaded[placement.key].reshape(-1)[slot.start : slot.start + target.numel()]
        target.data.copy_(part.view(target.shape))
    for slot in [placement.slot for placement in placements]:
        if not isinstance(slot.inner, (torch.optim.AdamW, torch.optim.Adam)):  # a fused Adam
            for group in slot.inner.param_groups:
                group["step"] = adam_steps
        elif slot.main is not None:
            # A tensor for each parameter: torch increments it in place, and one that parameters
            # share would be incremented once per parameter. Its fused kernels read it on the
            # device of the weights, the others on the host.
            fused = any(group.get("fused") for group in slot.inner.param_groups)
            device = slot.main.device if fused else "cpu"
            step = torch.tensor(float(adam_steps), dtype=torch.float32, device=device)
            slot.inner.state[slot.main]["step"] = step
