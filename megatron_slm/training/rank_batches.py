"""Batches as this rank feeds them to its model: its part of every sequence, on its device."""

from collections.abc import Iterator, Sequence
from functools import partial

from megatron_slm.data.batch import Batch, slice_for_context_parallel
from megatron_slm.data.loader import ValidationLoader
from megatron_slm.parallel import Groups
from megatron_slm.training.data_fault import read_together


def on_this_rank(batches: Sequence[Batch], groups: Groups) -> list[Batch]:
    """Micro-batches cut to this context-parallel rank and moved to its device."""
    return [
        slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size).to(groups.device)
        for batch in batches
    ]


class ValidationOnThisRank:
    """A validation loader's global batches, as this rank feeds them; all ranks iterate together.

    DataFault on all of them when the corpus cannot be read on one.
    """

    def __init__(self, loader: ValidationLoader, groups: Groups):
        self.loader, self.groups = loader, groups

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = iter(self.loader)
        for _ in range(len(self.loader)):
            batches = read_together(partial(next, steps), self.groups.device)
            yield on_this_rank(batches, self.groups)
