"""Reads `.metadata`, the list of a checkpoint's tensors and their positions in its files, as plain
data, without unpickling.

torch.distributed.checkpoint writes the file as a pickle. The names below are what it, and
megatron-core's own record of the save, consist of. What is not needed for reading (the record of
the save, the pickled paths) is left out.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_slm.files.inert_pickle import Record, load_inert
from megatron_slm.files.plain import plain_file, shown

METADATA = ".metadata"
_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
_IMMUTABLE = {"torch.Size": tuple} | {f"torch.{name}": getattr(torch, name) for name in _DTYPES}
_FORMAT = "torch.distributed.checkpoint.metadata."
_STORED_AT = "torch.distributed.checkpoint.filesystem._StorageInfo"
_PLAN = "torch.distributed.checkpoint.planner."
_KINDS = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
NAMES = frozenset(_FORMAT + kind.__name__ for kind in _KINDS) | {
    f"{_FORMAT}_MEM_FORMAT_ENCODING",
    _STORED_AT,
    "torch.serialization._get_layout",
    "pathlib.PosixPath",  # where an imported checkpoint was written
    "pathlib._local.PosixPath",
    # megatron-core's record of who wrote what
    f"{_PLAN}SavePlan",
    f"{_PLAN}WriteItem",
    f"{_PLAN}WriteItemType",
    f"{_PLAN}TensorWriteData",
    f"{_PLAN}BytesIOWriteData",
}


class _Malformed(Exception):
    """The file is plain data, but does not describe a checkpoint."""


def read_metadata(folder: str | Path) -> Metadata:
    """What the checkpoint in `folder` holds.

    UnsafeFile when the file names anything that could run code; ValueError when it is missing,
    damaged, or describes tensors that the folder's files cannot hold.
    """
    path = plain_file(folder, METADATA)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    tree = load_inert(content, NAMES, path, known=_IMMUTABLE)
    try:
        return _metadata(tree, Path(folder))
    except (_Malformed, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: does not describe this checkpoint ({shown(error, 400)}); copy the checkpoint "
            "again, or use another"
        ) from None


def _metadata(tree: Any, folder: Path) -> Metadata:
    described, stored = _fields(tree, f"{_FORMAT}Metadata", "state_dict_metadata", "storage_data")
    places = {_index(key): _place(value) for key, value in _mapping(stored).items()}
    _check_places(places, folder)
    held_bytes: dict[str, int] = {}
    for index, place in places.items():
        held_bytes[index.fqn] = held_bytes.get(index.fqn, 0) + place.length
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, value in _mapping(described).items():
        _require(isinstance(key, str), f"{key!r} names an entry")
        if isinstance(value, Record) and value.name == f"{_FORMAT}BytesStorageMetadata":
            entries[key] = BytesStorageMetadata()
        else:
            entries[key] = _tensor(key, value, held_bytes.get(key, 0))
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _tensor(key: str, value: Any, held_bytes: int) -> TensorStorageMetadata:
    """One tensor's description; its size must fit in the bytes that are stored of it, so that no
    file makes us allocate more.
    """
    properties, size, chunks = _fields(
        value, f"{_FORMAT}TensorStorageMetadata", "properties", "size", "chunks"
    )
    named = isinstance(properties, Record) and properties.name == f"{_FORMAT}TensorProperties"
    _require(
        named and isinstance(properties.state, tuple) and bool(properties.state),
        f"{key} has no properties",
    )
    dtype = properties.state[0]
    _require(isinstance(dtype, torch.dtype), f"{key} has the dtype {dtype!r}")
    size = _shape(size, key, smallest=1)
    needed_bytes = math.prod(size) * dtype.itemsize
    _require(
        needed_bytes <= held_bytes,
        f"{key} of size {tuple(size)} takes {needed_bytes} bytes, {held_bytes} are stored",
    )
    _require(isinstance(chunks, list), f"{key} has no list of pieces")
    pieces = []
    for chunk in chunks:
        offsets, sizes = _fields(chunk, f"{_FORMAT}ChunkStorageMetadata", "offsets", "sizes")
        pieces.append(
            ChunkStorageMetadata(_shape(offsets, key, smallest=0), _shape(sizes, key, smallest=1))
        )
        inside = len(offsets) == len(sizes) == len(size) and all(
            offset + length <= whole
            for offset, length, whole in zip(offsets, sizes, size, strict=True)
        )
        _require(inside, f"a piece of {key} lies outside of it")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, pieces)


def _index(value: Any) -> MetadataIndex:
    name, offset, position = _fields(value, f"{_FORMAT}MetadataIndex", "fqn", "offset", "index")
    _require(isinstance(name, str), f"{name!r} names an entry")
    _require(position is None or _is_count(position), f"{name} has the position {position!r}")
    return MetadataIndex(
        name, None if offset is None else _shape(offset, name, smallest=0), position
    )


def _place(value: Any) -> _StorageInfo:
    file, offset, length, transforms = _fields(
        value, _STORED_AT, "relative_path", "offset", "length", "transform_descriptors"
    )
    _require(isinstance(file, str), f"{file!r} names a file")
    _require(_is_count(offset) and _is_count(length), f"a place in {file} is {offset!r}+{length!r}")
    _require(not transforms, f"{file} is compressed ({transforms!r})")
    return _StorageInfo(file, offset, length)


def _check_places(places: dict[MetadataIndex, _StorageInfo], folder: Path) -> None:
    """Every place lies in a plain file of the folder, and inside of it."""
    ends: dict[str, int] = {}
    for place in places.values():
        ends[place.relative_path] = max(
            ends.get(place.relative_path, 0), place.offset + place.length
        )
    for name, end in ends.items():
        size_bytes = plain_file(folder, name).stat().st_size
        _require(end <= size_bytes, f"it reads {name} up to byte {end}, of {size_bytes}")


def _fields(record: Any, name: str, *fields: str) -> list[Any]:
    """The values of a dataclass's fields, None for one that is not there."""
    described = isinstance(record, Record) and record.name == name
    if not described or not isinstance(record.state, dict):
        raise _Malformed(f"expected {name.rpartition('.')[2]}, got {_short(record)}")
    return [record.state.get(field) for field in fields]


def _mapping(value: Any) -> dict:
    _require(isinstance(value, dict), f"expected a mapping, got {_short(value)}")
    return value


def _shape(value: Any, key: str, *, smallest: int) -> torch.Size:
    """Sizes or offsets: whole numbers from `smallest` on."""
    whole = isinstance(value, tuple) and all(_is_count(n) and n >= smallest for n in value)
    _require(whole, f"{key} has the size or offset {_short(value)}")
    return torch.Size(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise _Malformed(otherwise)


def _short(value: Any) -> str:
    return value.name.rpartition(".")[2] if isinstance(value, Record) else repr(value)[:80]
