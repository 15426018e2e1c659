"""Exact top-k of a population of tokens that may be spread over ranks.

N: tokens that this rank holds (any shape, flattened). A population is the tokens of every rank of
`group`.

    order    score descending, then global token id ascending
    kept     ceil(keep_fraction * eligible - 1e-9), at least 1 when any token is eligible
    mask     the first `kept` tokens in that order

A token competes when it is eligible and its score is finite. Every other token (padding, masked,
no score, NaN, +-inf) is outside the mask *and* outside the count: a padding token given the score 0
would sit inside the selection, because the threshold sits near 0.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.rankable import check_same_shape, rankable
from megatron_slm.selection.schedule import check_keep_fraction
from megatron_slm.selection.threshold import (
    Threshold,
    find_threshold,
    kept_tokens,
    last_kept_id,
    other_ranks,
    tokens_of_ranks,
)

__all__ = ["Selection", "kept_tokens", "select_top"]


class CountedMask(NamedTuple):
    """A mask, and how many of its tokens are true: a number that the host has read."""

    mask: Tensor
    tokens: int


@dataclass(frozen=True)
class Selection:
    """Which of this rank's tokens carry the loss, and the facts of the population they come from.

    mask        bool, the shape of the score: this rank's tokens that carry the loss.
    threshold   score of the last kept token, in the score's unit (nats for a loss); +inf when
                nothing is eligible. When several populations were chosen at once (scope
                `sequence`), the mean over those that have one.
    kept, eligible, ties
                tokens of the whole population (all ranks): kept, competing, and equal in score to
                the threshold.
    weight      None for a 0/1 choice, else fp32 in the shape of the mask and 0 outside it (soft
                weights).
    preferred   None, except where plain CLM is mixed in: then the mask is every eligible token, and
                this (bool) is the selective choice.
    counted     the mask with its number of tokens, where that came to the host together with the
                other facts; tokens_here reads it. Do not change a counted mask in place: put
                another into its place, as dataclasses.replace does.
    """

    mask: Tensor
    threshold: float
    kept: int
    eligible: int
    ties: int = 0
    weight: Tensor | None = None
    preferred: Tensor | None = None
    counted: CountedMask | None = None

    @property
    def tokens_here(self) -> int | None:
        """How many of this rank's tokens are in the mask; None where only the device knows it, and
        where a scorer has put another mask in the place of the one that was counted.
        """
        if self.counted is None or self.counted.mask is not self.mask:
            return None
        return self.counted.tokens

    @property
    def choice(self) -> Tensor:
        """bool: the tokens that won, which is the mask unless plain CLM is mixed in."""
        return self.mask if self.preferred is None else self.preferred

    @property
    def weights(self) -> Tensor:
        """fp32 in the shape of the mask: what each token's loss is multiplied by before the sum."""
        return self.mask.float() if self.weight is None else self.weight

    @property
    def weight_sum(self) -> Tensor:
        """Sum of this rank's weights (float64, 0-d, on the device; 1 per token for a 0/1 choice).

        The step's summed losses are divided by the sum of this over ranks and micro-batches.
        """
        return self.weights.sum(dtype=torch.float64)

    def split(self, rows: list[int]) -> "list[Selection]":
        """The same choice cut along the first dimension, one piece per micro-batch.

        Every piece repeats the facts of the whole population, and its own tokens are counted: one
        host synchronisation for all pieces.
        """
        cut = {
            name: value.split(rows)
            for name in ("mask", "weight", "preferred")
            if (value := getattr(self, name)) is not None
        }
        tokens = torch.stack([mask.sum() for mask in cut["mask"]]).tolist()
        cut["counted"] = tuple(map(CountedMask, cut["mask"], tokens))
        pieces = zip(*cut.values(), strict=True)
        return [replace(self, **dict(zip(cut, piece, strict=True))) for piece in pieces]


def select_top(
    score: Tensor,
    eligible: Tensor,
    keep_fraction: float,
    *,
    token_id: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    capacity: int | None = None,
) -> Selection:
    """The top share of a population by score, exactly. For one rank and distinct token ids:

        ranked = eligible & score.isfinite()
        kept   = max(1, ceil(keep_fraction * ranked.sum() - 1e-9))
        order  = sorted(ranked.nonzero(), key=lambda i: (-score[i], token_id[i]))
        mask[order[:kept]] = True

    score      floating point, any shape, this rank's part (may be empty). Ranked in fp32; -0.0
               equals +0.0. Never differentiated.
    eligible   bool (or 0/1), the shape of score.
    token_id   int64, the shape of score: breaks ties, so it must be unique in the population.
               Default: position in rank order.
    group      the ranks whose tokens compete; None is this rank alone. Every rank of the group must
               call, also with no tokens. Pass the data x context parallel group; never a tensor
               group, whose ranks hold copies of the same tokens.
    backend    how ranks agree on the threshold, with the same answer to the bit: "gather", "radix",
               or "auto", which chooses by size (threshold.py lists what each costs).
    capacity   the most tokens that any rank of the group holds, the same number on every rank:
               saves the exchange of sizes. Default: the ranks exchange them.

    Every rank gets the same threshold, kept, eligible and ties. Costs one host synchronisation; a
    few more small all-reduces only when the threshold falls inside a run of equal scores. Raises
    ValueError for a bad shape, dtype or keep_fraction, and when token ids repeat inside such a run.
    Source: Rho-1, equation 5 (I_k).
    """
    keep_fraction = check_keep_fraction(keep_fraction)
    check_same_shape(score, eligible=eligible, token_id=token_id)
    group = other_ranks(group)
    score_N = rankable(score, eligible).reshape(-1)
    threshold = find_threshold(score_N, keep_fraction, group, backend, capacity)
    mask_N = _top_mask(
        score_N, None if token_id is None else token_id.reshape(-1), threshold, group
    )
    mask = mask_N.view(score.shape)
    tokens_here = _tokens_here(threshold, group)
    return Selection(
        mask,
        threshold.score,
        threshold.kept,
        threshold.eligible,
        threshold.ties,
        counted=None if tokens_here is None else CountedMask(mask, tokens_here),
    )


def _tokens_here(threshold: Threshold, group: ProcessGroup | None) -> int | None:
    """This rank's kept tokens. None where a tie is broken between ranks: how many of the tied
    tokens are kept here depends on their ids.
    """
    if group is None:
        return threshold.kept
    return threshold.here if threshold.ties_kept == threshold.ties else None


def _top_mask(
    score_N: Tensor, token_id_N: Tensor | None, threshold: Threshold, group: ProcessGroup | None
) -> Tensor:
    if threshold.eligible == 0:
        return torch.zeros_like(score_N, dtype=torch.bool)
    if threshold.ties_kept == threshold.ties:
        return score_N >= threshold.score
    tie_N = score_N == threshold.score
    if token_id_N is None:
        token_id_N = _position_in_rank_order(score_N, group)
    last_id = last_kept_id(token_id_N[tie_N], threshold.ties_kept, group)
    return (score_N > threshold.score) | (tie_N & (token_id_N <= last_id))


def _position_in_rank_order(score_N: Tensor, group: ProcessGroup | None) -> Tensor:
    position_N = torch.arange(score_N.numel(), device=score_N.device)
    if group is None:
        return position_N
    return position_N + tokens_of_ranks(score_N, group)[: dist.get_rank(group)].sum()
