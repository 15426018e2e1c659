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
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_slm.checkpoint.folder import FORMATS
from megatron_slm.checkpoint.metadata_file import read_metadata
from megatron_slm.checkpoint.plain_reader import PlainReader

LAYERS = "decoder.layers."
STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one tensor of ours lies in the checkpoint."""

    key: str
    stored: TensorStorageMetadata
    index: tuple[int, ...]
    """Its place in the leading dimensions: (), (layer,) or (layer, expert)."""


class FullState(Mapping[str, Tensor]):
    """The whole, unsharded model tensors of a checkpoint folder under our names; each is read from
    disk on access.

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
        self._places: dict[str, _Place] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and MODEL_KEY.fullmatch(key):
                self._add(key, stored)
        if not self._places:
            raise ValueError(f"{self.folder} holds no model tensors")

    def _add(self, key: str, stored: TensorStorageMetadata) -> None:
        if not key.startswith(LAYERS):
            self._places[key] = _Place(key, stored, ())
            return
        suffix = key.removeprefix(LAYERS)
        kind = suffix.removeprefix(STORED_EXPERTS)
        for layer in range(stored.size[0]):
            if suffix.startswith(STORED_EXPERTS):
                for expert in range(stored.size[1]):
                    name = f"{LAYERS}{layer}.{OUR_EXPERTS}{expert}.{kind}"
                    self._places[name] = _Place(key, stored, (layer, expert))
            else:
                name = f"{LAYERS}{layer}.{OUR_NAMES.get(suffix, suffix)}"
                self._places[name] = _Place(key, stored, (layer,))

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        leading = len(place.index)
        own_size = place.stored.size[leading:]
        size = torch.Size([1] * leading + [*own_size])
        offsets = torch.Size([*place.index, *[0] * len(own_size)])
        tensor = torch.empty(size, dtype=place.stored.properties.dtype)
        reader = PlainReader(self.folder, self._metadata)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        chunk = ChunkStorageMetadata(offsets, size)
        items = create_read_items_for_chunk_list(place.key, place.stored, [chunk])
        if sum(math.prod(item.lengths) for item in items) != tensor.numel():
            raise ValueError(f"{self.folder}: {name} is only partly stored; use another checkpoint")
        reader.read_data(LoadPlan(items), _OneTensor(tensor)).wait()
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


class _OneTensor(LoadPlanner):
    """Hands the reader views of one destination tensor; the plan is made by the caller."""

    def __init__(self, destination: Tensor):
        self.destination = destination

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.destination
        for dimension, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dimension, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Does nothing: the reader has already written into the view."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """No objects are asked for."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        """Nothing is planned here."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the caller makes the plan")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError("the caller makes the plan")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError("the caller makes the plan")


def write_full_state(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    layers: int,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Write whole tensors as a checkpoint that megatron-core's dist_checkpointing.load reads into
    any parallel layout.

    `shapes` names every tensor of the model; each is read from `state` once, when it is written.
    The folder must exist and be empty; the caller renames it into place. metadata.json,
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
    """Keys of the (empty) extra state that the linear layers of megatron-core expect.

    It is one object per layer, or per layer and expert.
    """
    layers = counts[0]
    kinds = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    if len(counts) == 1:
        kinds += ["mlp.linear_fc1", "mlp.linear_fc2"]
    for kind in kinds:
        for layer in range(layers):
            yield f"{LAYERS}{kind}._extra_state/shard_{layer}_{layers}"
    for layer, expert in itertools.product(*map(range, counts)) if len(counts) == 2 else ():
        place = f"shard_{layer}.{expert}_{layers}.{counts[1]}"
        for kind in ("linear_fc1", "linear_fc2"):
            yield f"{LAYERS}{STORED_EXPERTS}{kind}._extra_state/{place}"


class _OneByOne(DefaultSavePlanner):
    """Plans one piece per layer (and expert) and tensor, and reads its content only when the writer
    needs it.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        layers: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._state = state
        self._dtype = dtype
        self._names: dict[tuple[str, torch.Size | None], str] = {}
        places = [stored_key(name)[1] for name in shapes]
        experts = max((place[1] + 1 for place in places if len(place) == 2), default=0)
        counts = (layers, experts) if experts else (layers,)
        self._items = [self._tensor_item(name, shape, counts) for name, shape in shapes.items()]
        for key in _extra_states(counts):
            self._items.append(
                WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, BytesIOWriteData(0))
            )

    def _tensor_item(self, name: str, shape: tuple[int, ...], counts: tuple[int, ...]) -> WriteItem:
        key, place = stored_key(name, mixture=len(counts) == 2)
        piece = torch.Size((*[1] * len(place), *shape))
        whole = torch.Size((*counts[: len(place)], *shape))
        offsets = torch.Size((*place, *[0] * len(shape)))
        index = MetadataIndex(key, offsets)
        self._names[key, index.offset] = name
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, piece), TensorProperties(dtype=self._dtype), whole
        )
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans):
        plans, metadata = create_default_global_save_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data={})

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # megatron-core stores the objects of one key as a list
            return nothing
        name = self._names[write_item.index.fqn, write_item.index.offset]
        assert write_item.tensor_data is not None  # _tensor_item gave it one
        piece = write_item.tensor_data.chunk.sizes
        return self._state[name].to(self._dtype).reshape(piece).contiguous()
