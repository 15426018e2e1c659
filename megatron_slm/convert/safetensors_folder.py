"""Tensors in safetensors files, one file or numbered shards with an index."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.files.atomic import write_json
from megatron_slm.files.plain import LeadsOutside, is_plain_name

LARGEST_SHARD_BYTES = 5 * 10**9


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
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(
        folder / "model.safetensors.index.json",
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


def _shards(index: Path) -> list[str]:
    """The files that an index of shards names.

    They may be links, as in the cache that `hf download` fills: what they lead to is read as
    safetensors, which holds no code. ValueError when it is no index; LeadsOutside when a file lies
    outside of the folder.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index}: no index of safetensors files ({type(error).__name__}: {error})"
        ) from None
    outside = [name for name in names if not is_plain_name(name)]
    if outside:
        raise LeadsOutside(
            f"{index} names {outside[0]!r}: only files in the model's own folder are read"
        )
    return sorted(names)


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder, one file or sharded; each is read on access.

    ValueError when there are none.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        files = _shards(index) if index.is_file() else ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: {', '.join(missing)} not found; expected model.safetensors, or its "
                f"shards with {index.name}"
            )
        opened = [safe_open(folder / name, framework="pt") for name in files]
        # What safe_open gives is no mapping: it cannot be iterated over.
        self._places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
