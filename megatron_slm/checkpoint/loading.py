"""Load a checkpoint's state through megatron-core's dist_checkpointing, with readers of our own
that run no code from its files.

megatron-core's own load opens `.metadata`, common.pt and objects with readers that unpickle. Here
its steps are taken in the same order, with `PlainReader` and `load_plain` in their place.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import (
    extract_sharded_base,
    force_all_tensors_to_non_fp8,
)
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    validate_integrity_and_strict_load,
)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_slm.checkpoint.folder import FORMATS
from megatron_slm.checkpoint.metadata_file import read_metadata
from megatron_slm.checkpoint.plain_reader import NOTHING, PlainReader, load_plain
from megatron_slm.files.plain import plain_file, read_json_object
from megatron_slm.parallel import Groups


def load_state(state: dict, folder: Path, groups: Groups) -> dict:
    """What the checkpoint in `folder` holds of a sharded state dict, for any layout.

    Every rank calls it.

    UnsafeFile on every rank when a file names something that could run code, ValueError when one is
    damaged.
    """
    metadata, common = _agreed(lambda: _open(folder))
    strategy = FullyParallelLoadStrategyWrapper(_PlainSharded(metadata), groups.dp_cp)
    try:
        return _load(state, common, folder, strategy)
    except CheckpointException as error:  # a BaseException, of every rank that failed
        first = error.failures[min(error.failures)][0]
        if isinstance(first, ValueError):
            raise type(first)(str(first)) from None
        raise


def _load(
    state: dict, common: dict, folder: Path, strategy: FullyParallelLoadStrategyWrapper
) -> dict:
    """As dist_checkpointing.load does, with the content of common.pt given."""
    force_all_tensors_to_non_fp8(state)
    state, kept_as_it_is, factories = load_preprocess(state)
    merge(common, kept_as_it_is)
    sharded, _ = extract_sharded_base(state)
    sharded, _, _ = validate_integrity_and_strict_load(
        sharded, StrictHandling.ASSUME_OK_UNEXPECTED, True, *determine_global_metadata(sharded)
    )
    merge(common, strategy.load(sharded, folder))
    return apply_factory_merges(common, factories)


def _open(folder: Path) -> tuple[Metadata, dict]:
    formats = read_json_object(folder, "metadata.json")
    if formats != FORMATS:
        raise ValueError(f"{folder / 'metadata.json'}: the format is {formats}, expected {FORMATS}")
    path = plain_file(folder, "common.pt")
    with open(path, "rb") as stream:
        common = load_plain(stream, NOTHING, path)
    if not isinstance(common, dict):
        raise ValueError(f"{path}: holds {type(common).__name__}, expected a mapping")
    return read_metadata(folder), common


def _agreed(action: Callable[[], Any]) -> Any:
    """The action's result; the ValueError or OSError of the first rank that has one, on every rank,
    so that none is left waiting.
    """
    result = None
    problem: ValueError | None = None
    try:
        result = action()
    except ValueError as error:
        problem = error
    except OSError as error:
        problem = ValueError(str(error))
    problems: list[ValueError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise problem
    return result


class _PlainSharded(TorchDistLoadShardedStrategy):
    def __init__(self, metadata: Metadata):
        super().__init__()
        self._metadata = metadata

    def load(self, sharded_state_dict: dict, checkpoint_dir: str | Path, *_: str) -> dict:
        """As TorchDistLoadShardedStrategy.load does, with another reader."""
        tensors = [
            tensor
            for tensor in nested_values(sharded_state_dict)
            if isinstance(tensor, ShardedTensor)
        ]
        by_key, flat_mapping, renamed = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict
        )
        stored = mcore_to_pyt_state_dict(by_key, True)
        same_shape = [tensor for tensor in tensors if not tensor.allow_shape_mismatch]
        other_shape = {tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch}
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=same_shape,
            allow_shape_mismatch_sharded_tensors=other_shape,
        )
        with warnings.catch_warnings():
            # Its successor requires the same keys on every rank; megatron-core uses this one too.
            warnings.filterwarnings("ignore", category=FutureWarning)
            dcp.load_state_dict(
                stored, PlainReader(checkpoint_dir, self._metadata), planner=planner
            )
        loaded = _replace_sharded_keys_with_state_dict_keys(
            {key: _unwrap_pyt_sharded_tensor(value) for key, value in stored.items()},
            flat_mapping,
            renamed,
        )
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded
