"""Forward passes of data-parallel ranks that share the experts of a mixture.

With expert parallelism the ranks exchange tokens inside every layer, so that each of them has to
run as many micro-batches as the others, also where it has less to do: a rank that stops early
leaves the others waiting until the job times out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_slm.data.batch import Batch
from megatron_slm.parallel import Groups

Output = TypeVar("Output")
Forward = Callable[[Sequence[Batch]], list[Output]]
"""Batches of one shape -> one output each on ranks that have them, else []."""


@dataclass(frozen=True)
class InStep:
    """Runs the same number of micro-batches on all data-parallel ranks where experts are spread
    over them, and just those that are asked for elsewhere.
    """

    groups: Groups

    @property
    def is_needed(self) -> bool:
        return self.groups.ep_size > 1 and self.groups.dp_size > 1

    def run(self, batches: Sequence[Batch], forward: Forward[Output]) -> list[Output]:
        """forward(batches). Ranks with fewer batches than another repeat their last one."""
        wanted = self._most(len(batches))
        repeated = [batches[-1]] * (wanted - len(batches))
        return forward([*batches, *repeated])[: len(batches)]

    def finish(self, idle: Batch, forward: Forward) -> None:
        """Join in what other ranks still run, until none has anything left.

        Every data-parallel rank calls it once, after its last `run`. idle: what is run meanwhile.
        """
        while wanted := self._most(0):
            forward([idle] * wanted)

    def _most(self, count: int) -> int:
        """The largest count of all data-parallel ranks; the model-parallel ranks beside this one
        have its count, so that all ranks of the job come to the same number.
        """
        if not self.is_needed:
            return count
        most = torch.tensor(count, device=self.groups.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.dp)
        return int(most)
