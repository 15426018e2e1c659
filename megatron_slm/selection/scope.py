"""Which tokens compete with which.

B: sequences of this rank's micro-batch. S: tokens of a sequence on this rank (sequence length / context parallel size).

The paper leaves it open ("ranking the tokens in a batch"), and it matters: with per-document loss offsets of 0.3 nats, choosing 60 % per
sequence shares only 0.78 of its tokens with the choice over everything. A choice over many documents also filters documents; a choice per
sequence cannot. Each scope is one function below, which says what it promises and what it costs.

    selection = select_in_scope(score_BS, eligible_BS, 0.6, scope="data_parallel", token_id=token_id_BS, group=dp_cp_group)
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.populations import SCOPES
from megatron_slm.selection.running_threshold import RunningThreshold
from megatron_slm.selection.schedule import check_keep_fraction
from megatron_slm.selection.select import (
    Selection,
    check_same_shape,
    kept_tokens,
    rankable,
    select_top,
)
from megatron_slm.selection.threshold import all_gather, other_ranks


@dataclass(frozen=True)
class Population:
    """The tokens that compete in one choice: a scope, their ids, and the groups that hold the rest of them.

    scope     one of SCOPES.
    token_id  int64 BS: (index of the sample in the global batch) * sequence length + position. Breaks ties.
    group     data x context parallel ranks of the last pipeline stage. Never the tensor group: its ranks hold the same tokens.
    cp_group  context parallel ranks: they hold the other pieces of the same sequences.
    running   the state of scope running_threshold, kept by the caller from step to step.
    capacity  the most tokens of any rank, when the caller knows it (select_top).
    """

    scope: str
    token_id: Tensor | None = None
    group: ProcessGroup | None = None
    cp_group: ProcessGroup | None = None
    running: RunningThreshold | None = None
    capacity: int | None = None

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.scope == "global_batch" and self.token_id is None:
            raise ValueError(
                "scope global_batch needs token_id: the default, position in rank order, changes with the layout"
            )
        if self.scope == "running_threshold" and self.running is None:
            raise ValueError(
                "scope running_threshold needs its state: pass running=RunningThreshold() and keep it from step to step"
            )

    def top(self, score_BS: Tensor, eligible_BS: Tensor, keep_fraction: float) -> Selection:
        """The top keep_fraction of the population by score."""
        match self.scope:
            case "sequence":
                return top_of_sequence(
                    score_BS, eligible_BS, keep_fraction, self.token_id, self.cp_group
                )
            case "micro_batch":
                return top_of_micro_batch(
                    score_BS,
                    eligible_BS,
                    keep_fraction,
                    self.token_id,
                    self.cp_group,
                    self.capacity,
                )
            case "data_parallel":
                return top_of_data_parallel(
                    score_BS, eligible_BS, keep_fraction, self.token_id, self.group, self.capacity
                )
            case "global_batch":
                return top_of_global_batch(
                    score_BS, eligible_BS, keep_fraction, self.token_id, self.group, self.capacity
                )
            case "running_threshold":
                return top_of_running_threshold(
                    score_BS, eligible_BS, keep_fraction, self.token_id, self.running
                )

    @property
    def ranks(self) -> ProcessGroup | None:
        """The group whose tokens form one population; None when no other rank takes part."""
        return other_ranks(
            {
                "data_parallel": self.group,
                "global_batch": self.group,
                "running_threshold": None,
            }.get(self.scope, self.cp_group)
        )

    def moments(self, value_BS: Tensor, known_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (fp32) of the known values of the population each token belongs to; broadcast against BS.

        Per row under scope sequence, else one number. A population without values has mean 0; the deviation is never below 1e-12. Added in
        fp64 in rank order: identical bits on every rank; another layout may change the last fp64 bit before the rounding to fp32.
        """
        value = torch.where(known_BS, value_BS.double(), 0.0)
        dim = (1,) if self.scope == "sequence" else tuple(range(value.dim()))
        count, total = add_over_ranks(
            torch.stack([known_BS.double().sum(dim, True), value.sum(dim, True)]), self.ranks
        )
        mean = total / count.clamp(min=1)
        square = add_over_ranks(
            torch.where(known_BS, (value - mean).square(), 0.0).sum(dim, True), self.ranks
        )
        return mean.float(), (square / count.clamp(min=1)).sqrt().clamp(min=1e-12).float()

    def of_sequence(self, value_BS: Tensor) -> Tensor:
        """Sum over each whole sequence, fp64 (B, 1): also over the pieces that other context parallel ranks hold."""
        return add_over_ranks(value_BS.double().sum(1, keepdim=True), other_ranks(self.cp_group))

    def chosen(
        self, mask_BS: Tensor, eligible_BS: Tensor, weight_BS: Tensor | None = None
    ) -> Selection:
        """A Selection from a mask that was not made by a threshold; counts what is kept and eligible over the population."""
        counts = add_over_ranks(torch.stack([mask_BS.sum(), eligible_BS.bool().sum()]), self.ranks)
        return Selection(mask_BS, math.nan, *counts.tolist(), weight=weight_BS)


def add_over_ranks(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over ranks, in rank order: bit-identical on all of them, which a floating point all-reduce does not promise."""
    if group is None:
        return value
    return torch.stack(all_gather(value, group)).sum(0)


def select_in_scope(
    score_BS: Tensor,
    eligible_BS: Tensor,
    keep_fraction: float,
    *,
    scope: str,
    token_id: Tensor | None = None,
    group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
    running: RunningThreshold | None = None,
    capacity: int | None = None,
) -> Selection:
    """The top keep_fraction of the tokens that compete under `scope`; the arguments are those of Population and select_top."""
    return Population(scope, token_id, group, cp_group, running, capacity).top(
        score_BS, eligible_BS, keep_fraction
    )


def top_of_micro_batch(
    score_BS, eligible_BS, keep_fraction, token_id_BS=None, cp_group=None, capacity=None
) -> Selection:
    """The tokens of this data-parallel rank's micro-batch compete.

    Promises  exactly ceil(k * eligible) of every micro-batch, whatever the context parallel size. Changing the micro-batch size or the
              data-parallel size changes which sequences meet, so it changes the choice.
    Costs     one quickselect; no collective without context parallelism.
    """
    return select_top(
        score_BS,
        eligible_BS,
        keep_fraction,
        token_id=token_id_BS,
        group=cp_group,
        capacity=capacity,
    )


def top_of_data_parallel(
    score_BS, eligible_BS, keep_fraction, token_id_BS=None, group=None, capacity=None
) -> Selection:
    """The current micro-batch of all data x context parallel ranks competes: the widest population that one pass can have.

    Promises  exactly ceil(k * eligible) of those tokens, the same threshold on every rank, no dependence on the context parallel size or
              on how the sequences are dealt to ranks. Micro-batch i meets micro-batch i only, because 1F1B runs its backward before
              the next losses exist: another data-parallel size is another population.
    Costs     a few small all-reduces per micro-batch, in the middle of the step: it makes the ranks wait for the slowest.
    """
    return select_top(
        score_BS, eligible_BS, keep_fraction, token_id=token_id_BS, group=group, capacity=capacity
    )


def top_of_global_batch(
    score_BS, eligible_BS, keep_fraction, token_id_BS, group=None, capacity=None
) -> Selection:
    """All tokens of the optimizer step compete. B here is every sequence of this rank's step: concatenate the micro-batches, choose once,
    and cut the result with Selection.split.

    Promises  exactly ceil(k * eligible) of the step; the same set under every data-parallel size, micro-batch size and layout (another
              tensor layout rounds the losses differently: tokens within float error of the threshold may swap).
    Costs     the scores of the whole step before the first backward: a forward pass first (about +1/3 of the step), unless the score is
              static (stored columns only). Then a few small all-reduces per step.
    """
    return select_top(
        score_BS, eligible_BS, keep_fraction, token_id=token_id_BS, group=group, capacity=capacity
    )


def top_of_running_threshold(
    score_BS, eligible_BS, keep_fraction, token_id_BS, running: RunningThreshold
) -> Selection:
    """Tokens compete with the threshold of recent steps.

    Promises  about the share k, with no population to wait for. The first step, which has no past, chooses exactly per micro-batch. The
              distance from the exact set of each step is measured and reported, never assumed (RunningThreshold.finish_step).
    Costs     one comparison per token. At the end of the step, where ranks meet anyway to add gradients, one exact threshold search.
    """
    return running.choose(score_BS, eligible_BS, keep_fraction, token_id_BS)


def top_of_sequence(
    score_BS, eligible_BS, keep_fraction, token_id_BS=None, cp_group=None
) -> Selection:
    """Every sequence is its own population: all rows at once, each by the rule of select_top.

    Promises  exactly ceil(k * eligible) of every sequence; no dependence on micro-batch, data-parallel or context parallel size. It cannot
              tell a good document from a bad one.
    Costs     one sort of the micro-batch's rows; with context parallelism one all-gather of the scores among the ranks of a sequence.
    """
    keep_fraction = check_keep_fraction(keep_fraction)
    check_same_shape(score_BS, eligible=eligible_BS, token_id=token_id_BS)
    if score_BS.dim() != 2:
        raise ValueError(
            f"scope sequence needs a score of shape (sequences, tokens), got {tuple(score_BS.shape)}"
        )
    cp_group = other_ranks(cp_group)
    local_BS = rankable(score_BS, eligible_BS)
    score_BT = _whole_rows(local_BS, cp_group)
    eligible_B = (score_BT > -math.inf).sum(1)
    kept_B = torch.tensor(
        [kept_tokens(keep_fraction, n) for n in eligible_B.tolist()],
        dtype=torch.int64,
        device=score_BT.device,
    )
    threshold_B = _take(score_BT.sort(dim=1, descending=True).values, kept_B).masked_fill(
        kept_B == 0, math.inf
    )
    above_BT, tie_BT = score_BT > threshold_B[:, None], score_BT == threshold_B[:, None]
    ties_B, ties_kept_B = tie_BT.sum(1), kept_B - above_BT.sum(1)
    mask_BS = local_BS >= threshold_B[:, None]
    if bool((ties_B > ties_kept_B).any()):
        local_id_BS = _position_in_row(local_BS, cp_group) if token_id_BS is None else token_id_BS
        last_id_B = _last_kept_id_of_rows(
            _whole_rows(local_id_BS, cp_group), tie_BT, ties_kept_B, ties_B
        )
        mask_BS = mask_BS & (
            (local_BS > threshold_B[:, None]) | (local_id_BS <= last_id_B[:, None])
        )
    known_B = threshold_B[kept_B > 0]
    threshold = float(known_B.double().mean()) if known_B.numel() else math.inf
    return Selection(
        mask_BS, threshold, *torch.stack([kept_B.sum(), eligible_B.sum(), ties_B.sum()]).tolist()
    )


def _whole_rows(local_BS: Tensor, cp_group: ProcessGroup | None) -> Tensor:
    """Every rank's piece of each row, side by side in rank order."""
    if cp_group is None:
        return local_BS
    return torch.cat(all_gather(local_BS, cp_group), dim=1)


def _position_in_row(local_BS: Tensor, cp_group: ProcessGroup | None) -> Tensor:
    start = 0 if cp_group is None else dist.get_rank(cp_group) * local_BS.shape[1]
    return torch.arange(start, start + local_BS.shape[1], device=local_BS.device).expand(
        local_BS.shape
    )


def _last_kept_id_of_rows(
    id_BT: Tensor, tie_BT: Tensor, ties_kept_B: Tensor, ties_B: Tensor
) -> Tensor:
    largest = torch.iinfo(torch.int64).max
    sorted_BT = id_BT.masked_fill(~tie_BT, largest).sort(dim=1).values
    last_id_B = _take(sorted_BT, ties_kept_B)
    next_id_B = _take(sorted_BT, torch.minimum(ties_kept_B + 1, ties_B))
    repeated_B = (ties_B > ties_kept_B) & (next_id_B == last_id_B)
    if bool(repeated_B.any()):
        raise ValueError(
            f"token id {int(last_id_B[repeated_B][0])} occurs twice in one sequence, so the tie at the threshold cannot be broken"
        )
    return last_id_B


def _take(values_BT: Tensor, place_B: Tensor) -> Tensor:
    """values_BT[b, place_B[b] - 1]; rows with place 0 give an arbitrary value."""
    if values_BT.shape[1] == 0:
        return values_BT.new_zeros(values_BT.shape[0])
    return values_BT.gather(1, (place_B - 1).clamp(min=0)[:, None])[:, 0]
