"""Tensors in safetensors files, one file or numbered shards with an index."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.convert.folder_kinds import other_kind
from megatron_slm.files.atomic import write_json
from megatron_slm.files.plain import LeadsOutside, is_plain_name

LARGEST_SHARD_BYTES = 5 * 10**9
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
"""What the weights may be stored as, in the names of safetensors."""
LFS_POINTER = b"version https://git-lfs"


def write_safetensors(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    largest_shard_bytes: int = LARGEST_SHARD_BYTES,
) -> None:
    """model.safetensors, or numbered shards with model.safetensors.index.json; holds one shard in
    memory.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    for name, tensor in tensors:
        if shard and held_bytes + tensor.nbytes > largest_shard_bytes:
            shards.append(_write_shard(shard, folder, len(shards)))
            shard = {}
            held_bytes = 0
        shard[name] = tensor.contiguous()
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    shards.append(_write_shard(shard, folder, len(shards)))
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / ONE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def _part(number: int) -> str:
    return f"part_{number}.safetensors"


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    path = folder / _part(number)
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes its files readable by their owner only
    return list(shard)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards names it.

    They may be links, as in the cache that `hf download` fills: what they lead to is read as
    safetensors, which holds no code. ValueError when it is no index; LeadsOutside when a file lies
    outside of the folder.
    """
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({*weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index}: no index of safetensors files ({type(error).__name__}: {error})"
        ) from None
    outside = [name for name in names if not is_plain_name(name)]
    if outside:
        raise LeadsOutside(
            f"{index} names {outside[0]!r}: only files in the model's own folder are read"
        )
    return weight_map


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder, one file or sharded; each is read on access.

    ValueError when there are none, when a file cannot be read, when the folder says in two ways
    where a tensor is, or when tensors are of integers or of 8-bit floats.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / INDEX
        weight_map = _weight_map(index) if index.is_file() else None
        files = sorted({*weight_map.values()}) if weight_map else [ONE_FILE]
        if ONE_FILE not in files and (folder / ONE_FILE).exists():
            raise ValueError(
                f"{folder} has {ONE_FILE} and, with {INDEX}, shards too; which of them is meant "
                "is not known: remove one"
            )
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: {', '.join(missing)} not found; expected {ONE_FILE}, or its "
                f"shards with {INDEX}{other_kind(folder)}"
            )
        self._places: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        for name in files:
            self._open(folder / name)
        if weight_map is not None and weight_map != self._files:
            differing = sorted({name for name, _ in weight_map.items() ^ self._files.items()})
            raise ValueError(
                f"{index} does not say where the tensors are: it and the files differ in "
                f"{', '.join(differing[:4])}"
            )
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._places.items()
        }
        """The shape of each tensor, as the files' headers have it."""

    def _open(self, path: Path) -> None:
        file = _opened(path)
        # What safe_open gives is no mapping: it cannot be iterated over.
        for name in file.keys():  # noqa: SIM118
            if name in self._files:
                raise ValueError(
                    f"{path.parent}: {name} is in {self._files[name]} and in {path.name}; which of "
                    "them is meant is not known"
                )
            dtype = file.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                raise ValueError(
                    f"{path}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)} "
                    "(dequantise the model, and save it again)"
                )
            self._places[name] = file
            self._files[name] = path.name

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _opened(path: Path) -> Any:
    """A safetensors file, its header read. ValueError with the file's name when it is none."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a pointer of Git LFS and not the weights: run `git lfs pull`"
            )
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors has an exception class of its own
        raise ValueError(
            f"{path}: not readable as safetensors ({error}; it has {path.stat().st_size} bytes); "
            "was it copied whole?"
        ) from None
