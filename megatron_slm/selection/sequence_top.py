"""The top share of every sequence at once: each row by the rule of select_top.

B: sequences, S: tokens of a sequence on this rank, T: tokens of a whole sequence.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.radix import kept_on_device
from megatron_slm.selection.rankable import check_same_shape, rankable
from megatron_slm.selection.schedule import check_keep_fraction
from megatron_slm.selection.select import CountedMask, Selection
from megatron_slm.selection.threshold import all_gather, other_ranks


def top_of_sequences(
    score_BS: Tensor,
    eligible_BS: Tensor,
    keep_fraction: float,
    token_id_BS: Tensor | None = None,
    cp_group: ProcessGroup | None = None,
) -> Selection:
    """Exactly ceil(k * eligible) tokens of every sequence; cp_group holds its other pieces.

    The Selection's threshold is the mean over the sequences that have one; its counts are sums.
    """
    keep_fraction = check_keep_fraction(keep_fraction)
    check_same_shape(score_BS, eligible=eligible_BS, token_id=token_id_BS)
    if score_BS.dim() != 2:
        raise ValueError(
            "scope sequence needs a score of shape (sequences, tokens), "
            f"got {tuple(score_BS.shape)}"
        )
    cp_group = other_ranks(cp_group)
    local_BS = rankable(score_BS, eligible_BS)
    score_BT = _whole_rows(local_BS, cp_group)
    eligible_B = (score_BT > -math.inf).sum(1)
    kept_B = kept_on_device(keep_fraction, eligible_B)
    sorted_BT = score_BT.sort(dim=1, descending=True).values
    threshold_B = _take(sorted_BT, kept_B).masked_fill(kept_B == 0, math.inf)
    tie_BT = score_BT == threshold_B[:, None]
    ties_B = tie_BT.sum(1)
    ties_kept_B = kept_B - (score_BT > threshold_B[:, None]).sum(1)
    mask_BS = local_BS >= threshold_B[:, None]
    here_B = mask_BS.sum(1)
    found = _Found.read(threshold_B, kept_B, eligible_B, ties_B, ties_kept_B, here_B)
    if found.broken_ties:
        id_BS = _position_in_row(local_BS, cp_group) if token_id_BS is None else token_id_BS
        id_BT = _whole_rows(id_BS, cp_group)
        last_id_B = _last_kept_id_of_rows(id_BT, tie_BT, ties_kept_B, ties_B)
        mask_BS &= (local_BS > threshold_B[:, None]) | (id_BS <= last_id_B[:, None])
    counted = None
    if cp_group is None or not found.broken_ties:
        counted = CountedMask(mask_BS, found.kept if cp_group is None else found.here)
    return Selection(
        mask_BS, found.threshold, found.kept, found.eligible, found.ties, counted=counted
    )


class _Found(NamedTuple):
    """What the host has to know of all rows."""

    threshold: float
    kept: int
    eligible: int
    ties: int
    here: int
    """This rank's tokens that are not below the threshold of their row."""
    broken_ties: bool
    """Whether some row keeps only some of the tokens that equal its threshold."""

    @classmethod
    def read(
        cls,
        threshold_B: Tensor,
        kept_B: Tensor,
        eligible_B: Tensor,
        ties_B: Tensor,
        ties_kept_B: Tensor,
        here_B: Tensor,
    ) -> "_Found":
        """Everything at once: one wait for the device. A tie to be broken costs another."""
        counts = (kept_B, eligible_B, ties_B, ties_kept_B, here_B)
        columns_6B = torch.stack([threshold_B.double(), *counts])
        thresholds, kept, eligible, ties, ties_kept, here = columns_6B.tolist()
        known = [threshold for threshold, count in zip(thresholds, kept, strict=True) if count > 0]
        return cls(
            torch.tensor(known, dtype=torch.float64).mean().item() if known else math.inf,
            int(sum(kept)),
            int(sum(eligible)),
            int(sum(ties)),
            int(sum(here)),
            ties != ties_kept,
        )


def _whole_rows(local_BS: Tensor, cp_group: ProcessGroup | None) -> Tensor:
    """Every rank's piece of each row, side by side in rank order."""
    if cp_group is None:
        return local_BS
    return torch.cat(all_gather(local_BS, cp_group), dim=1)


def _position_in_row(local_BS: Tensor, cp_group: ProcessGroup | None) -> Tensor:
    length = local_BS.shape[1]
    start = 0 if cp_group is None else dist.get_rank(cp_group) * length
    position_S = torch.arange(start, start + length, device=local_BS.device)
    return position_S.expand(local_BS.shape)


def _last_kept_id_of_rows(
    id_BT: Tensor, tie_BT: Tensor, ties_kept_B: Tensor, ties_B: Tensor
) -> Tensor:
    """Of each row's tied tokens, the largest id that is kept; ValueError when it is not unique."""
    largest = torch.iinfo(torch.int64).max
    sorted_BT = id_BT.masked_fill(~tie_BT, largest).sort(dim=1).values
    last_id_B = _take(sorted_BT, ties_kept_B)
    next_id_B = _take(sorted_BT, torch.minimum(ties_kept_B + 1, ties_B))
    repeated_B = (ties_B > ties_kept_B) & (next_id_B == last_id_B)
    if bool(repeated_B.any()):
        raise ValueError(
            f"token id {int(last_id_B[repeated_B][0])} occurs twice in one sequence, "
            "so the tie at the threshold cannot be broken"
        )
    return last_id_B


def _take(values_BT: Tensor, place_B: Tensor) -> Tensor:
    """values_BT[b, place_B[b] - 1]; rows with place 0 give an arbitrary value."""
    if values_BT.shape[1] == 0:
        return values_BT.new_zeros(values_BT.shape[0])
    return values_BT.gather(1, (place_B - 1).clamp(min=0)[:, None])[:, 0]
