"""Finds the score that separates kept from dropped tokens, in three ways with the same result.

N: this rank's tokens. R: ranks of the group. Scores are "rankable": fp32, -inf where a token does
not compete, no -0.0.

| way    | moves per rank             | collectives       | work                                  |
|--------|----------------------------|-------------------|---------------------------------------|
| local  | nothing                    | none              | one quickselect of N                  |
| gather | 4 bytes per token of all R | 2 (sizes, scores) | one quickselect of N*R, on every rank |
| radix  | 3 x 2048 counts (48 KB)    | 3 all-reduces     | one histogram of N                    |

Ranks may hold different numbers of tokens, and no rank knows the numbers of the others: the choice
between gather and radix must depend on something that all ranks know. Either the caller knows a
capacity, the most tokens that any rank holds; or the first message of "auto" has the same size on
every rank: a header, and as many scores as fit. A small population needs only that collective, as
all_gather + topk would; otherwise all ranks learn all sizes from the headers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.populations import GATHER_MAX_TOKENS_ACCELERATOR
from megatron_slm.selection.radix import kept_on_device, kth_largest_score, kth_smallest_id

BACKENDS = ("auto", "gather", "radix")
# Measured over gloo with 2 to 8 processes (benchmarks/selection.py): up to this many tokens an
# all-gather beats three all-reduces.
GATHER_MAX_TOKENS = 262_144
# Scores that travel with the sizes, over all ranks: 128 KB is where a gloo collective begins to
# cost more than its start.
FIRST_MESSAGE_TOKENS = 32_768


@dataclass(frozen=True)
class Threshold:
    """What separates kept tokens from dropped ones, and counts over the whole population."""

    score: float
    """Score of the last kept token; +inf when nothing is eligible."""
    kept: int
    eligible: int
    ties: int
    """Tokens whose score equals the threshold."""
    ties_kept: int
    """How many of them are kept."""
    here: int
    """This rank's tokens whose score is not below the threshold."""


NOTHING_ELIGIBLE = Threshold(math.inf, 0, 0, 0, 0, 0)


def kept_tokens(keep_fraction: float, eligible: int) -> int:
    """ceil(keep_fraction * eligible - 1e-9), at least 1 when any is eligible.

    0.55 of 100 is 55, although 0.55 * 100 > 55 in floating point.
    """
    return min(eligible, max(1, math.ceil(keep_fraction * eligible - 1e-9)))


def other_ranks(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, or None when it holds this rank alone: then no collective is needed."""
    return None if group is None or dist.get_world_size(group) == 1 else group


def find_threshold(
    score_N: Tensor,
    keep_fraction: float,
    group: ProcessGroup | None,
    backend: str = "auto",
    capacity: int | None = None,
) -> Threshold:
    """The threshold of the population: identical on every rank, whatever the backend, but for
    what it says of this rank.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if capacity is not None and score_N.numel() > capacity:
        raise ValueError(
            f"capacity must be the most tokens that any rank holds, got {capacity}, but this rank "
            f"holds {score_N.numel()}"
        )
    if group is None:
        return _kth_largest(score_N, keep_fraction)
    if backend == "auto" and capacity is None and score_N.device.type == "cpu":
        tokens_R, all_scores = _first_message(score_N, group)
        if all_scores is not None:
            return _kth_largest(all_scores, keep_fraction, score_N)
        backend = "gather" if sum(tokens_R) <= GATHER_MAX_TOKENS else "radix"
        capacity = max(tokens_R)
    if backend == "auto":
        backend = _backend_for(score_N, capacity, dist.get_world_size(group))
    if backend == "gather":
        capacity = int(tokens_of_ranks(score_N, group).max()) if capacity is None else capacity
        return _kth_largest(_gather(score_N, capacity, group), keep_fraction, score_N)
    return Threshold(*kth_largest_score(score_N, keep_fraction, group))


def _backend_for(score_N: Tensor, capacity: int | None, ranks: int) -> str:
    """gather for a population that is known to be small, else radix.

    An accelerator without a capacity uses radix: the sizes would have to reach the host, which is
    one more synchronisation than all of radix.
    """
    limit = GATHER_MAX_TOKENS if score_N.device.type == "cpu" else GATHER_MAX_TOKENS_ACCELERATOR
    return "gather" if capacity is not None and capacity * ranks <= limit else "radix"


def _kth_largest(score_N: Tensor, keep_fraction: float, own_N: Tensor | None = None) -> Threshold:
    """The threshold of a population whose scores all lie on this rank. own_N: those of its own
    tokens; None = all.

    numpy's vectorised quickselect needs a tenth of torch.kthvalue's time, on CPU only.
    """
    if score_N.device.type != "cpu":
        return kth_largest_by_sort(score_N, keep_fraction, own_N)
    values_N = score_N.numpy()
    eligible = int(np.count_nonzero(values_N > -math.inf))
    if eligible == 0:
        return NOTHING_ELIGIBLE
    kept = kept_tokens(keep_fraction, eligible)
    score = quickselect(values_N, values_N.size - kept)
    above = int(np.count_nonzero(values_N > score))
    ties = int(np.count_nonzero(values_N == score))
    here = above + ties if own_N is None else int(np.count_nonzero(own_N.numpy() >= score))
    return Threshold(score, kept, eligible, ties, kept - above, here)


def kth_largest_by_sort(
    score_N: Tensor, keep_fraction: float, own_N: Tensor | None = None
) -> Threshold:
    """The same with one synchronisation and few kernels: for accelerators, which sort a million
    scores in less than 0.1 ms.
    """
    if score_N.numel() == 0:
        return NOTHING_ELIGIBLE
    eligible = (score_N > -math.inf).sum()
    kept = kept_on_device(keep_fraction, eligible)
    score = score_N.sort(descending=True).values.take((kept - 1).clamp(min=0))
    ties_kept = kept - (score_N > score).sum()
    here = ((score_N if own_N is None else own_N) >= score).sum()
    counts = torch.stack([kept, eligible, (score_N == score).sum(), ties_kept, here])
    value, *numbers = torch.cat([score.double().view(1), counts.double()]).tolist()
    threshold = Threshold(value, *map(int, numbers))
    return threshold if threshold.eligible else NOTHING_ELIGIBLE


def quickselect(values_N: np.ndarray, index: int) -> float:
    """The value at `place` of the sorted array."""
    return float(np.partition(values_N, index)[index])


def tokens_of_ranks(score_N: Tensor, group: ProcessGroup) -> Tensor:
    """How many tokens each rank holds: int64 (R,), on the device.

    By an all-reduce, because a small one is cheaper than a small all-gather.
    """
    tokens_R = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=score_N.device)
    tokens_R[dist.get_rank(group)] = score_N.numel()
    dist.all_reduce(tokens_R, group=group)
    return tokens_R


def _first_message(score_N: Tensor, group: ProcessGroup) -> tuple[list[int], Tensor | None]:
    """(tokens of every rank, all scores if they fitted into the messages, else None)."""
    scores_sent = FIRST_MESSAGE_TOKENS // dist.get_world_size(group)
    message = score_N.new_full((2 + scores_sent,), -math.inf)
    message[:2].view(torch.int64).fill_(score_N.numel())  # the header: 8 bytes, two floats wide
    if score_N.numel() <= scores_sent:
        message[2 : 2 + score_N.numel()] = score_N
    messages = all_gather(message, group)
    tokens_R = [int(message_of_rank[:2].view(torch.int64)) for message_of_rank in messages]
    if max(tokens_R) > scores_sent:
        return tokens_R, None
    scores = [
        message_of_rank[2 : 2 + tokens]
        for message_of_rank, tokens in zip(messages, tokens_R, strict=True)
    ]
    return tokens_R, torch.cat(scores)


def _gather(score_N: Tensor, capacity: int, group: ProcessGroup) -> Tensor:
    """All ranks' scores in one tensor.

    Ranks with fewer than `capacity` tokens are padded with -inf, which never competes.
    """
    missing = capacity - score_N.numel()
    if missing:
        score_N = torch.cat([score_N, score_N.new_full((missing,), -math.inf)])
    return torch.cat(all_gather(score_N, group))


def all_gather(value: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's tensor, in rank order; all have the shape of value."""
    gathered = [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(gathered, value.contiguous(), group=group)
    return gathered


def last_kept_id(tie_id_N: Tensor, ties_kept: int, group: ProcessGroup | None) -> int:
    """The largest id among the `ties_kept` smallest of the population.

    Raises ValueError when that id is not unique.
    """
    last_id, copies = kth_smallest_id(tie_id_N, ties_kept, group)
    if copies > 1:
        raise ValueError(
            f"token id {last_id} belongs to {copies} tokens of one population, so the tie at the "
            "threshold cannot be broken; ids must be unique over the ranks of `group` (is a tensor "
            "parallel group passed, whose ranks hold the same tokens?)"
        )
    return last_id
