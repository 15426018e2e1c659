"""Read the content of a checkpoint's files: tensors, numbers and text, never code. All loading of
checkpoints goes through this file.

torch.distributed.checkpoint unpickles everything that is no tensor (random states, extra states of
layers), and megatron-core adds classes of its own to those that torch's weights-only loading makes.
Here a file may name only what the lists below hold, torch's weights-only loading reads it with no
other additions, and objects that are no tensors are rebuilt before they are handed on.
"""

import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_slm.checkpoint.extra_state import plain_extra_state
from megatron_slm.checkpoint.metadata_file import read_metadata
from megatron_slm.checkpoint.weights_only import load_weights_only
from megatron_slm.files.inert_pickle import refuse_names
from megatron_slm.files.plain import plain_file, shown

RANDOM_KEY = "random"
_STORAGES = (
    "Double",
    "Float",
    "Half",
    "BFloat16",
    "Long",
    "Int",
    "Short",
    "Char",
    "Byte",
    "Bool",
)
NOTHING: frozenset[str] = frozenset()
TENSORS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "collections.OrderedDict",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
    }
)
RANDOM_STATES = TENSORS | {
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",  # how torch.save writes bytes
}


class PlainReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint folder, which accepts plain data only.

    ValueError (UnsafeFile) names a file that holds something else.
    """

    def __init__(self, folder: str | Path, metadata: Metadata | None = None):
        super().__init__(folder)
        self._folder = Path(folder)
        self._metadata = read_metadata(folder) if metadata is None else metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            by_file.setdefault(place.relative_path, []).append(item)
        for name, items in by_file.items():
            path = plain_file(self._folder, name)
            with open(path, "rb") as file:
                for item in items:
                    self._read_item(item, file, path, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, item: ReadItem, file: IO[bytes], path: Path, planner: LoadPlanner) -> None:
        content = self._slice_file(file, self.storage_data[item.storage_index])
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, _plain_objects(item.storage_index.fqn, content.read(-1), path))
            return
        tensor = load_plain(content, TENSORS, path)
        if type(tensor) is not torch.Tensor:
            raise ValueError(
                f"{path}: {shown(item.storage_index.fqn)} is no tensor; copy the file again"
            )
        tensor = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.size() != tensor.size():
            raise ValueError(
                f"{path}: {shown(item.storage_index.fqn)} has a piece of size "
                f"{tuple(tensor.size())}, .metadata says {tuple(target.size())}; copy the "
                "checkpoint again"
            )
        target.copy_(tensor)
        planner.commit_tensor(item, target)


def load_plain(
    stream: IO[bytes],
    names: Collection[str],
    path: str | Path,
    stand_ins: Collection[tuple[Callable, str]] = (),
) -> Any:
    """What torch.save wrote into `stream`, if it consists of plain Python values and `names` alone.

    `stand_ins` (what to make, name) are made in place of what these names mean elsewhere.
    UnsafeFile names another name, before anything is loaded; ValueError when the stream is damaged.
    Both name `path`.
    """
    try:
        named = _named(stream)
    except Exception as error:  # on a damaged file, these readers raise errors of any type
        raise _unreadable(path, error) from None
    refuse_names(named - set(names), path)
    stream.seek(0)
    try:
        return load_weights_only(stream, stand_ins)
    except Exception as error:
        raise _unreadable(path, error) from None


def _named(stream: IO[bytes]) -> set[str]:
    """Every function and class that the pickle in torch.save's archive names; nothing is loaded."""
    with torch.serialization._open_zipfile_reader(stream) as archive:
        content = io.BytesIO(archive.get_record("data.pkl"))
    return torch._weights_only_unpickler.get_globals_in_pkl(content)


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    said = str(error).splitlines()[0] if str(error) else ""
    return ValueError(
        f"{path}: not readable ({type(error).__name__}: {shown(said)}); copy it again"
    )


def _plain_objects(key: str, content: bytes, path: Path) -> io.BytesIO:
    """The objects stored under `key`, checked and pickled again. The caller unpickles the result,
    and so unpickles bytes that this program wrote.
    """
    random = key.partition("/")[0] == RANDOM_KEY
    names, stand_ins = (RANDOM_STATES, _STAND_INS) if random else (TENSORS, ())
    objects = load_plain(io.BytesIO(content), names, path, stand_ins)
    if not isinstance(objects, list):
        raise ValueError(f"{path}: {shown(key)} is no list of objects; copy the checkpoint again")
    make_plain = _with_arrays if random else plain_extra_state
    plain = [make_plain(value, path) for value in objects]
    again = io.BytesIO()
    torch.save(plain, again)
    again.seek(0)
    return again


class _DtypeStandIn:
    """Stands for a pickled numpy.dtype. numpy's own class would also accept a state that interprets
    arbitrary memory as objects.
    """

    def __init__(self, code: str = "", *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.byte_order = state[1]


class _ArrayStandIn:
    """Stands for a pickled numpy.ndarray."""

    state: tuple = ()

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _new_array(*_: Any) -> _ArrayStandIn:
    return _ArrayStandIn()


_STAND_INS = (
    (_new_array, "numpy._core.multiarray._reconstruct"),
    (_new_array, "numpy.core.multiarray._reconstruct"),
    (_ArrayStandIn, "numpy.ndarray"),
    (_DtypeStandIn, "numpy.dtype"),
)


def _with_arrays(value: Any, path: Path) -> Any:
    """The same value with real arrays in place of stand-ins: one-dimensional, of uint32, as numpy's
    random state is.
    """
    if isinstance(value, _ArrayStandIn):
        try:
            _, (length,), dtype, _, content = value.state
            if dtype.code != "u4" or dtype.byte_order != "<" or len(content) != 4 * length:
                raise ValueError(f"{length} values of {dtype.code}")
            return np.frombuffer(content, dtype="<u4").astype(np.uint32)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: a random state holds an array that is no vector of uint32 ({error}); "
                "copy the checkpoint again"
            ) from None
    if isinstance(value, dict):
        return {_with_arrays(k, path): _with_arrays(v, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_arrays(item, path) for item in value)
    return value
