"""Optimizer state by parameter name: the same in every parallel layout, with and without the distributed optimizer.

megatron-core 0.16.1 cannot resume its distributed optimizer over torch's AdamW (its state dict asserts on a fresh
optimizer, shares one step tensor between parameters, and its reshardable format fails on "step"), and its two
optimizers cannot read each other's checkpoints. So each parameter's moments (and fp32 main weight, under bf16) are
saved here under the parameter's own global name and shape; the distributed optimizer's slices are put together
for saving and cut again on load. Cost: 8 bytes per parameter of this rank's model shard in host memory while saving
(12 under bf16), and one reduction of them over the data-parallel ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Slot:
    """One model parameter and the optimizer tensors of the part of it this rank updates (`start` = its first element)."""

    parameter: torch.nn.Parameter
    main: torch.Tensor | None  # None: this data-parallel rank owns no element of the parameter
    inner: torch.optim.Optimizer
    start: int
    data_parallel_group: object | None


def _slots(optimizer) -> Iterator[_Slot]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
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
                    yield _Slot(parameter, main, part.optimizer, 0, None)
        else:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield _Slot(parameter, parameter, part.optimizer, 0, None)


def _distributed_slot(part: DistributedOptimizer, parameter) -> _Slot:
    gbuf_index, dtype, bucket_index = part.model_param_gbuf_map.get(parameter, (None, None, None))
    if (
        gbuf_index is None
        or parameter not in part.gbuf_ranges[gbuf_index][dtype][bucket_index]["param_map"]
    ):
        return _Slot(parameter, None, part.optimizer, 0, part.data_parallel_group)
    group, order = part.model_param_group_index_map[parameter]
    start = part.gbuf_ranges[gbuf_index][dtype][bucket_index]["param_map"][parameter]["param"].start
    return _Slot(
        parameter,
        part.optimizer.param_groups[group]["params"][order],
        part.optimizer,
        start,
        part.data_parallel_group,
    )


def _ensure_state(slot: _Slot) -> dict:
    """The inner optimizer's state of the slot, allocated as its first step would allocate it."""
    state = slot.inner.state[slot.main]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(slot.main, dtype=torch.float32)
    return state


def adam_steps(optimizer) -> int:
    """How many updates the optimizer has made (torch keeps the number per parameter, fused Adams per group)."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups if getattr(part, "optimizer", None) else []:
            if "step" in group and group["params"]:
                return int(group["step"])
            for parameter in group["params"]:
                if "step" in part.optimizer.state.get(parameter, {}):
                    return int(part.optimizer.state[parameter]["step"])
    return 0


def sharded_optimizer_state(
    optimizer, model_state: dict, *, for_loading: bool
) -> tuple[dict, list]:
    """(sharded state dict, placements): full tensors of every parameter of this rank's model shard, by global name.

    `for_loading` allocates without gathering. Give the placements and the loaded dict to `take_loaded_state`.
    """
    extracted, _ = extract_sharded_tensors_and_factories(model_state)
    described = {id(sharded.data): sharded for sharded in nested_values(extracted)}
    tensors, placements = {}, []
    for index, slot in enumerate(_slots(optimizer)):
        sharded = described.get(id(slot.parameter))
        if sharded is None:
            raise RuntimeError(
                "a parameter of the optimizer is not in the model's state dict; take it from the unwrapped model with keep_vars"
            )
        main = slot.parameter.dtype != torch.float32
        for name in (*MOMENTS, *(("param",) if main else ())):
            full = torch.zeros(
                slot.parameter.shape,
                dtype=torch.float32,
                device="cpu" if slot.data_parallel_group is None else slot.parameter.device,
            )
            if not for_loading:
                full = _assembled(slot, name, full)
            key = f"{index}.{name}"
            tensors[key] = _named_like(sharded, full, f"optimizer.{name}")
            placements.append((key, slot, name))
    return tensors, placements


def _assembled(slot: _Slot, name: str, full: torch.Tensor) -> torch.Tensor:
    """The whole parameter's tensor: this rank's slice, and the other data-parallel ranks' by one sum over zeros."""
    if slot.main is not None:
        part = slot.main if name == "param" else _ensure_state(slot)[name]
        full.view(-1)[slot.start : slot.start + part.numel()].copy_(part.detach().view(-1))
    if slot.data_parallel_group is not None:
        dist.all_reduce(full, group=slot.data_parallel_group)
    return full.cpu()


def _named_like(sharded, tensor: torch.Tensor, prefix: str):
    if isinstance(sharded, ShardedTensorFactory):
        return replace(sharded, key=f"{prefix}.{sharded.key}", data=tensor)
    return make_sharded_optimizer_tensor(sharded, tensor, prefix)


def take_loaded_state(optimizer, placements: list, loaded: dict, steps: int) -> None:
    """Copy loaded full tensors into the optimizer's own (sliced) ones, and set the update count everywhere."""
    for key, slot, name in placements:
        if slot.main is None:
            continue
        target = slot.main if name == "param" else _ensure_state(slot)[name]
        part = loaded[key].reshape(-1)[slot.start : slot.start + target.numel()]
        target.data.copy_(part.view(target.shape))
    fused = {
        id(slot.inner): slot.inner
        for _, slot, _ in placements
        if not isinstance(slot.inner, (torch.optim.AdamW, torch.optim.Adam))
    }
    for inner in fused.values():
        for group in inner.param_groups:
            group["step"] = steps
    for _, slot, _ in placements:
        if slot.main is not None and id(slot.inner) not in fused:
            # One tensor each: torch increments it in place, so a shared one would count once per parameter.
            slot.inner.state[slot.main]["step"] = torch.tensor(float(steps), dtype=torch.float32)
