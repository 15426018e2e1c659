"""Counts where Python reads a tensor's values: on a GPU each such place waits for the device."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZED_BY_VALUES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal"}
"""Operations whose result's size, or whose answer, the host has to learn."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class _Dispatch(TorchDispatchMode):
    """Notes item(), float(tensor), bool(tensor), results sized by values, and indexing by masks."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name == "_local_scalar_dense" or name in SIZED_BY_VALUES or by_mask:
            self.found[_place()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[Counter]:
    """Counts per "room/file.py function" of our code, or per file of another library."""
    found: Counter = Counter()
    originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "cpu", "numpy")}

    def noting(original):
        def noted(self, *args, **kwargs):
            found[_place()] += 1
            return original(self, *args, **kwargs)

        return noted

    for name, original in originals.items():
        setattr(torch.Tensor, name, noting(original))
    try:
        with _Dispatch(found):
            yield found
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def _place() -> str:
    """The innermost frame of our library; where there is none, the innermost one of another's."""
    outside = "?"
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/megatron_slm/" in frame.filename:
            return f"{frame.filename.rpartition('/megatron_slm/')[2]} {frame.name}"
        if outside == "?" and "/tests/" not in frame.filename:
            outside = frame.filename.rpartition("site-packages/")[2]
    return outside
