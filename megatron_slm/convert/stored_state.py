"""Whole model tensors out of, and into, a checkpoint folder: one process, no GPU, no process group,
one tensor in memory at a time.

A checkpoint is a torch.distributed.checkpoint folder as megatron-core's "torch_dist" format writes
it (`.metadata`, `__R_T.distcp`) with four habits of megatron-core:
- all layers of one kind are one tensor with the layer number in front:
  decoder.layers.mlp.linear_fc2.weight is [L, H, F];
- so are all experts of all layers: decoder.layers.mlp.experts.experts.linear_fc2.weight is [L, E,
  H, F];
- the two norms of a layer are stored under Transformer Engine's fused names, except the one before
  a mixture of experts;
- the fused gate+up matrix is stored whole (all gate rows, then all up rows), whatever the
  tensor-parallel size.
"""

import dataclasses
import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import planner as planning
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_slm.checkpoint.folder import FORMATS
from megatron_slm.checkpoint.metadata_file import read_metadata
from megatron_slm.checkpoint.plain_reader import PlainReader

LAYERS = "decoder.layers."
STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
OUR_EXPERTS, STORED_EXPERTS = "mlp.experts.local_experts.", "mlp.experts.experts."
OUR_NAMES = {stored: ours for ours, stored in STORED_NAMES.items()}
# Only what starts like this is the model's; optimizer state and random states in the same folder
# are left alone.
MODEL_KEY = re.compile(r"(embedding|decoder|output_layer)\..*")


def stored_key(name: str, *, mixture: bool = False) -> tuple[str, tuple[int, ...]]:
    """The checkpoint's key of one of our tensors, and its place in the leading dimensions: (),
    (layer,) or (layer, expert).
    """
    match = re.fullmatch(re.escape(LAYERS) + r"(\d+)\.(.+)", name)
    if match is None:
        return name, ()
    layer, suffix = int(match[1]), match[2]
    if expert := re.fullmatch(re.escape(OUR_EXPERTS) + r"(\d+)\.(.+)", suffix):
        return f"{LAYERS}{STORED_EXPERTS}{expert[2]}", (layer, int(expert[1]))
    fused = not (mixture and suffix.startswith("pre_mlp_layernorm"))
    return LAYERS + (STORED_NAMES.get(suffix, suffix) if fused else suffix), (layer,)


class FullState(Mapping[str, Tensor]):
    """The whole, unsharded model tensors of a checkpoint folder under our names; each is read from
    disk when asked for.

    ValueError when the folder is no complete checkpoint; UnsafeFile when a file of it names
    something that could run code.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        missing = [
            name for name in (".metadata", "metadata.json") if not (self.folder / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"{self.folder} is not a complete checkpoint: {' and '.join(missing)} not found "
                "in it"
            )
        self._metadata = read_metadata(self.folder)
        self._places: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and MODEL_KEY.fullmatch(key):
                self._add(key, stored)
        if not self._places:
            raise ValueError(f"{self.folder} holds no model tensors")

    def _add(self, key: str, stored: TensorStorageMetadata) -> None:
        if not key.startswith(LAYERS):
            self._places[key] = (key, ())
            return
        suffix = key.removeprefix(LAYERS)
        for layer in range(stored.size[0]):
            if suffix.startswith(STORED_EXPERTS):
                for expert in range(stored.size[1]):
                    self._places[
                        f"{LAYERS}{layer}.{OUR_EXPERTS}{expert}.{suffix.removeprefix(STORED_EXPERTS)}"
                    ] = (key, (layer, expert))
            else:
                self._places[f"{LAYERS}{layer}.{OUR_NAMES.get(suffix, suffix)}"] = (key, (layer,))

    def __getitem__(self, name: str) -> Tensor:
        key, place = self._places[name]
        stored = self._metadata.state_dict_metadata[key]
        own_size = stored.size[len(place) :]
        size, offsets = torch.Size([1] * len(place) + [*own_size]), [*place, *[0] * len(own_size)]
        tensor = torch.empty(size, dtype=stored.properties.dtype)
        reader = PlainReader(self.folder, self._metadata)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        items = create_read_items_for_chunk_list(
            key, stored, [ChunkStorageMetadata(torch.Size(offsets), size)]
        )
        if sum(math.prod(item.lengths) for item in items) != tensor.numel():
            raise ValueError(f"{self.folder}: {name} is only partly stored; use another checkpoint")
        reader.read_data(planning.LoadPlan(items), _OneTensor(tensor)).wait()
        return tensor.view(own_size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_full_state(folder: str | Path) -> FullState:
    """The model tensors of one checkpoint folder (a step_* folder), from any tensor x pipeline
    layout; see FullState.
    """
    return FullState(folder)


class _OneTensor(planning.LoadPlanner):
    """Hands the reader views of one destination tensor; the plan is made by the caller."""

    def __init__(self, destination: Tensor):
        self.destination = destination

    def resolve_tensor(self, read_item: planning.ReadItem) -> Tensor:
        view = self.destination
        for dimension, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dimension, offset, length)
        return view

    def commit_tensor(self, read_item: planning.ReadItem, tensor: Tensor) -> None: ...
    def load_bytes(self, read_item: planning.ReadItem, value: io.BytesIO) -> None: ...
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None: ...
    def create_local_plan(self) -> planning.LoadPlan: ...
    def create_global_plan(self, global_plan): ...
    def finish_plan(self, central_plan): ...


def write_full_state(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    layers: int,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write whole tensors as a checkpoint that megatron-core's dist_checkpointing.load reads into
    any parallel layout.

    `shapes` names every tensor of the model; `state` is asked for each of them once, when it is
    written. The folder must exist and be empty; the caller renames it into place. metadata.json,
    megatron-core's mark of a complete checkpoint, is written last.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # one process is the intent
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_OneByOne(state, shapes, layers, dtype),
            no_dist=True,
        )
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMATS))


def _extra_states(counts: tuple[int, ...]) -> Iterator[str]:
    """Keys of the (empty) extra state that the linear layers of megatron-core expect, one object
    per layer, or per layer and expert.
    """
    layers = counts[0]
    per_layer = ["self_attention.linear_qkv", "self_attention.linear_proj"] + [
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ] * (len(counts) == 1)
    yield from (
        f"{LAYERS}{kind}._extra_state/shard_{layer}_{layers}"
        for kind in per_layer
        for layer in range(layers)
    )
    for layer, expert in itertools.product(*map(range, counts)) if len(counts) == 2 else ():
        for kind in ("linear_fc1", "linear_fc2"):
            yield f"{LAYERS}{STORED_EXPERTS}{kind}._extra_state/shard_{layer}.{expert}_{layers}.{counts[1]}"


class _OneByOne(DefaultSavePlanner):
    """Plans one piece per layer (and expert) and tensor, and asks for its content only when the
    writer has reached it.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        layers: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._state, self._dtype, self._names = state, dtype, {}
        numbers = [
            place[1] for place in (stored_key(name)[1] for name in shapes) if len(place) == 2
        ]
        counts = (layers, max(numbers) + 1) if numbers else (layers,)
        self._items = [self._tensor_item(name, shape, counts) for name, shape in shapes.items()]
        for key in _extra_states(counts):
            self._items.append(
                planning.WriteItem(
                    MetadataIndex(key), planning.WriteItemType.BYTE_IO, planning.BytesIOWriteData(0)
                )
            )

    def _tensor_item(
        self, name: str, shape: tuple[int, ...], counts: tuple[int, ...]
    ) -> planning.WriteItem:
        key, place = stored_key(name, mixture=len(counts) == 2)
        piece, whole, offsets = (
            (*[1] * len(place), *shape),
            (*counts[: len(place)], *shape),
            (*place, *[0] * len(shape)),
        )
        index = MetadataIndex(key, torch.Size(offsets))
        self._names[key, index.offset] = name
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(piece))
        properties = TensorProperties(dtype=self._dtype)
        data = planning.TensorWriteData(chunk, properties, torch.Size(whole))
        return planning.WriteItem(index, planning.WriteItemType.SHARD, tensor_data=data)

    def create_local_plan(self) -> planning.SavePlan:
        return planning.SavePlan(self._items)

    def create_global_plan(self, all_plans):
        plans, metadata = create_default_global_save_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data={})

    def resolve_data(self, write_item: planning.WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == planning.WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # megatron-core stores the objects of one key as a list
            return nothing
        name = self._names[write_item.index.fqn, write_item.index.offset]
        return (
            self._state[name]
            .to(self._dtype)
            .reshape(write_item.tensor_data.chunk.sizes)
            .contiguous()
        )
