"""Validation batches as this rank feeds them to its model."""

from collections.abc import Iterator
from functools import partial

from megatron_slm.data.batch import Batch
from megatron_slm.data.loader import ValidationLoader
from megatron_slm.model.context_parallel import on_this_rank
from megatron_slm.parallel import Groups
from megatron_slm.training.data_fault import read_together


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
