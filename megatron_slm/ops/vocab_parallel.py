"""The vocabulary split over tensor ranks: which columns are this rank's, and the collectives.

Legend: T tensor ranks, N tokens, M = N / T rows of one sequence-parallel shard, K rows with a
gradient, H hidden, F fields.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed the two collectives and warns under the old names; the pinned torch may be
# older.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns of the true vocabulary: [first_id, first_id + columns).

    Padding columns are never computed: their logits count as -inf.
    """

    group: dist.ProcessGroup | None
    """None for a single rank."""
    ranks: int
    rank: int
    first_id: int
    columns: int
    vocabulary_size: int

    @classmethod
    def of(
        cls, local_columns: int, group: dist.ProcessGroup | None, vocabulary_size: int | None
    ) -> "VocabularyShard":
        """ValueError when the true vocabulary is larger than all ranks' (equal) shards together."""
        ranks = group.size() if group is not None else 1
        rank = group.rank() if group is not None else 0
        padded = local_columns * ranks
        true = padded if vocabulary_size is None else vocabulary_size
        if not 0 < true <= padded:
            raise ValueError(
                f"vocabulary_size is {true}, but the weight has {local_columns} rows on each of "
                f"{ranks} tensor rank(s) = {padded} columns; "
                f"give the true size, between 1 and {padded}."
            )
        columns = min(max(true - rank * local_columns, 0), local_columns)
        return cls(group if ranks > 1 else None, ranks, rank, rank * local_columns, columns, true)

    def local_target(self, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """(column_N on this rank, 0 where another rank has it; owned_N bool)."""
        column_N = target_N - self.first_id
        owned_N = (column_N >= 0) & (column_N < self.columns)
        return column_N.where(owned_N, 0), owned_N

    def gather_fields(self, fields_FN: Tensor) -> list[Tensor]:
        """The [F, N] vectors of every rank, in rank order, the same bits on every rank."""
        if self.group is None:
            return [fields_FN]
        return list(all_gather_rows(fields_FN, self.group).chunk(self.ranks))

    def gather_rows(self, rows_MH: Tensor) -> Tensor:
        """All ranks' rows [T * M, H] in rank order."""
        assert self.group is not None, "rows are sharded over several ranks only"
        return all_gather_rows(rows_MH, self.group)

    def reduce_scatter_rows(self, partial_NH: Tensor) -> Tensor:
        """This rank's rows [M, H] of the sum of every rank's `partial_NH`."""
        assert self.group is not None, "rows are sharded over several ranks only"
        return reduce_scatter_rows(partial_NH, self.group)


def all_gather_rows(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's shard, joined along the first dimension in rank order."""
    whole = shard.new_empty((group.size() * shard.shape[0], *shard.shape[1:]))
    _all_gather(whole, shard.contiguous(), group=group)
    return whole


def reduce_scatter_rows(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's equal part, along the first dimension, of the sum of every rank's `partial`."""
    part = partial.new_empty((partial.shape[0] // group.size(), *partial.shape[1:]))
    _reduce_scatter(part, partial.contiguous(), group=group)
    return part


def combine_lse(lse_TN: list[Tensor]) -> Tensor:
    """log of the sum of exp over ranks, added in rank order: the same bits on every rank."""
    if len(lse_TN) == 1:
        return lse_TN[0]
    maximum_N = torch.stack(lse_TN).amax(0)
    total_N = torch.zeros_like(maximum_N)
    for lse_N in lse_TN:
        total_N += (lse_N - maximum_N).exp()
    return maximum_N + total_N.log()


@dataclass(frozen=True)
class KeptRowLayout:
    """Where the K kept of N rows are when rows are sharded over the ranks (sequence parallelism).

    Each rank contributes its own kept rows, padded to the fullest rank's count, so that the
    collectives carry kept rows only. The layout is the same on every rank, because the incoming
    gradient is.
    """

    shard: VocabularyShard
    rank_index: Tensor
    """Kept rows of this rank, numbered within its M rows."""
    slot_K: Tensor
    """Position of each kept row in the padded [T * longest] order."""
    longest: int
    """Rows of the fullest rank; at least 1, so that a collective runs when no row is kept."""

    @classmethod
    def of(cls, index_K: Tensor, rows_per_rank: int, shard: VocabularyShard) -> "KeptRowLayout":
        """The layout of the rows index_K, in ascending order.

        One wait for the device: the fullest rank's count is the size of the collectives.
        """
        device = index_K.device
        first_row_T = torch.arange(shard.ranks + 1, device=device) * rows_per_rank
        # How many kept rows come before those of each rank; the last number counts all of them.
        start_T = torch.searchsorted(index_K, first_row_T)
        starts = start_T.tolist()
        longest = max(1, *(end - start for start, end in pairwise(starts)))
        owner_K = index_K.div(rows_per_rank, rounding_mode="floor")
        within_K = torch.arange(len(index_K), device=device) - start_T[owner_K]
        rank_index = index_K[starts[shard.rank] : starts[shard.rank + 1]]
        return cls(
            shard, rank_index - shard.rank * rows_per_rank, owner_K * longest + within_K, longest
        )

    def gather(self, rows_MH: Tensor) -> Tensor:
        """This rank's shard [M, H] to the kept rows of all ranks [K, H]."""
        padded = rows_MH.new_zeros((self.longest, rows_MH.shape[1]))
        padded[: len(self.rank_index)] = rows_MH[self.rank_index]
        return self.shard.gather_rows(padded)[self.slot_K]

    def reduce_scatter(self, partial_KH: Tensor, rows_per_rank: int) -> Tensor:
        """Sum of every rank's partial [K, H], scattered to this rank's [M, H].

        Rows that are not kept are zero.
        """
        padded = partial_KH.new_zeros((self.shard.ranks * self.longest, partial_KH.shape[1]))
        padded[self.slot_K] = partial_KH
        received = self.shard.reduce_scatter_rows(padded)
        rows_MH = partial_KH.new_zeros((rows_per_rank, partial_KH.shape[1]))
        rows_MH[self.rank_index] = received[: len(self.rank_index)]
        return rows_MH
