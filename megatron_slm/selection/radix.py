"""Exact k-th value of a population spread over ranks, by radix select: traffic does not depend on
the number of tokens.

Every value is written as an integer with the same order. The values of each leading digit are
counted, and the sum of the counts over all ranks gives the leading digit of the k-th value; the
next digit is found among the values that share it. An fp32 score has 32 bits: three digits of 11,
11 and 10 bits, three all-reduces of 2048 counts. Nothing is approximated. All ranks compute from
the same counts, so all get the same bits.

N: this rank's values. Counts are int64 (int32 would cap a population at 2^31 tokens; latency, not
bytes, is the cost).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

DIGIT_BITS = 11


def kth_largest_score(
    score_N: Tensor,
    keep_fraction: float,
    group: ProcessGroup | None,
    *,
    compact: bool | None = None,
) -> tuple[float, int, int, int, int, int]:
    """(threshold, kept, eligible, ties, ties kept) of the population, as a sort of all ranks'
    scores would give, and how many of this rank's scores are not below the threshold.

    score_N is fp32 with -inf where a token does not compete. compact: drop the scores that are out
    between digits (default: on CPU), or mark them, because on an accelerator a shape that depends
    on data is a host synchronisation. There is one, at the end.
    """
    compact = score_N.device.type == "cpu" if compact is None else compact
    key_N = _order_preserving(score_N)
    prefix = torch.zeros((), dtype=torch.int64, device=key_N.device)
    eligible = take = kept = ties = prefix
    alive_N: Tensor | None = None
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        digit_N = (key_N >> shift) & ((1 << bits) - 1)
        if shift == 21:
            digit_N = digit_N ^ (1 << 10)  # the sign bit: negative keys come first
        counts = _count(digit_N, alive_N, 1 << bits, group)
        if shift == 21:
            counts[_DIGIT_OF_MINUS_INF] = 0  # a digit no finite score has
            eligible = counts.sum()
            kept = take = kept_on_device(keep_fraction, eligible)
        digit, take, ties = _walk_down(counts, take)
        prefix = (prefix << bits) | digit
        key_N, alive_N = _keep_alive(key_N, alive_N, digit_N == digit, compact)
    threshold = _score_of(prefix - (1 << 31))
    here = torch.count_nonzero(score_N >= threshold)
    packed = torch.stack([kept, eligible, ties, take, here]).double()
    value, *numbers = torch.cat([threshold.double().view(1), packed]).tolist()
    host_kept, host_eligible, host_ties, host_taken, host_here = map(int, numbers)
    if not host_eligible:
        return math.inf, 0, 0, 0, 0, 0
    return value, host_kept, host_eligible, host_ties, host_taken, host_here


def kth_smallest_id(
    id_N: Tensor, k: int, group: ProcessGroup | None, *, compact: bool | None = None
) -> tuple[int, int]:
    """(the k-th smallest int64 of the population, how often it occurs).

    k must be between 1 and the population's size.
    """
    compact = id_N.device.type == "cpu" if compact is None else compact
    # One all-reduce finds the range, so that only the digits which differ are walked: 2 for a
    # million tokens.
    if id_N.numel():
        bounds = torch.stack([id_N.max(), -id_N.min()])
    else:
        bounds = id_N.new_full((2,), -(1 << 62))
    if group is not None:
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    largest = bounds[0]
    smallest = -bounds[1]
    key_N = largest - id_N  # descending order of keys is ascending order of ids
    digits = max(1, math.ceil(int(largest - smallest).bit_length() / DIGIT_BITS))
    prefix = torch.zeros((), dtype=torch.int64, device=id_N.device)
    take = copies = prefix + k
    alive_N: Tensor | None = None
    for shift in range((digits - 1) * DIGIT_BITS, -1, -DIGIT_BITS):
        digit_N = (key_N >> shift) & ((1 << DIGIT_BITS) - 1)
        counts = _count(digit_N, alive_N, 1 << DIGIT_BITS, group)
        digit, take, copies = _walk_down(counts, take)
        prefix = (prefix << DIGIT_BITS) | digit
        key_N, alive_N = _keep_alive(key_N, alive_N, digit_N == digit, compact)
    kth, copies = torch.stack([largest - prefix, copies]).tolist()
    return kth, copies


# Leading 11 bits of the key of -inf, sign already flipped; finite scores have other exponents, so
# nothing else has this digit.
_DIGIT_OF_MINUS_INF = 3


def _order_preserving(score_N: Tensor) -> Tensor:
    """int32 whose signed order is the order of the floats.

    The bits below the sign of a negative float count downwards, so they are flipped.
    """
    bits_N = score_N.contiguous().view(torch.int32)
    flip_N = bits_N >> 31
    return flip_N.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits_N)


def _score_of(key: Tensor) -> Tensor:
    """Inverse of _order_preserving, for one key."""
    key = key.to(torch.int32).view(1)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)[0]


def _count(
    digit_N: Tensor, alive_N: Tensor | None, bins: int, group: ProcessGroup | None
) -> Tensor:
    """How many of the population's remaining values have each digit: int64 (bins,)."""
    if digit_N.device.type == "cpu" and alive_N is None:
        counts = torch.bincount(digit_N, minlength=bins)
    else:  # on an accelerator bincount looks at its maximum on the host; scatter_add_ does not
        counts = torch.zeros(bins, dtype=torch.int64, device=digit_N.device)
        ones_N = torch.ones_like(digit_N, dtype=torch.int64) if alive_N is None else alive_N.long()
        counts.scatter_add_(0, digit_N.long(), ones_N)
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts


def _walk_down(counts: Tensor, take: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(digit of the take-th value counted from the top, how many are still to take inside that
    digit, how many it has).
    """
    down = counts.flip(0)
    reached = down.cumsum(0)
    place = (reached < take).sum().clamp(max=counts.numel() - 1)
    inside = down.take(place)  # not down[place], which would ask the device for the number
    return counts.numel() - 1 - place, take - (reached.take(place) - inside), inside


def _keep_alive(
    key_N: Tensor, alive_N: Tensor | None, match_N: Tensor, compact: bool
) -> tuple[Tensor, Tensor | None]:
    if compact:
        return key_N[match_N], None
    return key_N, match_N if alive_N is None else alive_N & match_N


def kept_on_device(keep_fraction: float, eligible: Tensor) -> Tensor:
    """threshold.kept_tokens on the device, in the same double precision."""
    kept = torch.ceil(keep_fraction * eligible.double() - 1e-9).long()
    return torch.minimum(kept.clamp(min=1), eligible)
