"""Bytes that autograd holds for backward, measured while a step runs.

The peak counts all micro-batches in flight.
"""

import weakref
from collections import Counter
from collections.abc import Iterable

import torch


class SavedActivations:
    """`with SavedActivations(parameters) as saved:` around a step; then read saved.peak_bytes.

    Every storage counts once, however many views of it are saved; parameters do not count. Only
    what goes through autograd's saved tensors is seen: not the head's kept logits, and not tensors
    that Python code keeps beside the graph.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self._left_out = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._holders: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda holder: holder.tensor
        )

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> "_Holder":
        holder = _Holder(tensor)
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._left_out:
            if not self._holders[place]:
                self._bytes[place] = storage.nbytes()
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._holders[place] += 1
            weakref.finalize(holder, self._released, place)
        return holder

    def _released(self, place: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self.live_bytes -= self._bytes[place]


class _Holder:
    """What autograd keeps in the tensor's place."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
