"""A threshold carried from step to step, so that selecting needs no collective.

N: this rank's tokens of one step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.rankable import check_same_shape, rankable
from megatron_slm.selection.schedule import check_keep_fraction
from megatron_slm.selection.select import CountedMask, Selection, select_top


@dataclass(frozen=True)
class _MicroBatch:
    """What the choice on one micro-batch was made from, and what was chosen."""

    score_N: Tensor
    chosen_N: Tensor
    token_id_N: Tensor | None


class RunningThreshold:
    """An exponential average of the exact thresholds of past steps.

        threshold[t+1] = smoothing * threshold[t] + (1 - smoothing) * exact[t]
        0 <= smoothing < 1

    Per micro-batch: `choose`. After the last micro-batch of every step, on every rank of the group:
    `finish_step`, which finds the exact threshold of the step that has just passed and measures how
    far the choice made was from the exact one. Without `finish_step` the scores of all steps
    accumulate in memory and the threshold never changes. `state_dict` must be saved in the
    checkpoint.
    """

    def __init__(self, smoothing: float = 0.5):
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(
                f"smoothing must be at least 0 and below 1, got {smoothing!r}; "
                "0 uses the last step's threshold alone"
            )
        self.smoothing = smoothing
        self.threshold: float | None = None
        self._step: list[_MicroBatch] = []

    def choose(
        self,
        score_BS: Tensor,
        eligible_BS: Tensor,
        keep_fraction: float,
        token_id_BS: Tensor | None = None,
    ) -> Selection:
        """Eligible tokens with score >= threshold.

        The facts of the Selection are of this rank's micro-batch alone.
        """
        check_same_shape(score_BS, eligible=eligible_BS, token_id=token_id_BS)
        rankable_BS = rankable(score_BS, eligible_BS)
        if self.threshold is None:
            selection = select_top(score_BS, eligible_BS, keep_fraction, token_id=token_id_BS)
        else:
            check_keep_fraction(keep_fraction)
            selection = _above(rankable_BS, self.threshold)
        id_N = None if token_id_BS is None else token_id_BS.reshape(-1)
        self._step.append(_MicroBatch(rankable_BS.reshape(-1), selection.mask.reshape(-1), id_N))
        return selection

    def finish_step(
        self, keep_fraction: float, group: ProcessGroup | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Move the threshold towards the exact one of this step; returns this rank's (sum, count)
        of the measured deviation.

        selection/missed_fraction  tokens of the exact set that were not chosen / of the exact set
        selection/extra_fraction   tokens chosen that are not in it / tokens of the exact set

        Every rank of the group must call it with the keep_fraction that holds for the step. Empty
        after a step without a choice (a scorer that ranks nothing, such as none).
        """
        if not self._step:
            return {}
        score_N = torch.cat([part.score_N for part in self._step])
        chosen_N = torch.cat([part.chosen_N for part in self._step])
        ids = [part.token_id_N for part in self._step if part.token_id_N is not None]
        id_N = torch.cat(ids) if len(ids) == len(self._step) else None
        self._step = []
        exact = select_top(score_N, score_N > -math.inf, keep_fraction, token_id=id_N, group=group)
        if exact.eligible:
            past = exact.threshold if self.threshold is None else self.threshold
            self.threshold = self.smoothing * past + (1.0 - self.smoothing) * exact.threshold
        size = exact.mask.sum()
        return {
            "selection/missed_fraction": ((exact.mask & ~chosen_N).sum(), size),
            "selection/extra_fraction": ((chosen_N & ~exact.mask).sum(), size),
        }

    def state_dict(self) -> dict[str, float | None]:
        return {"threshold": self.threshold, "smoothing": self.smoothing}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restores the threshold. The smoothing is the caller's setting: a run may resume with
        another one.
        """
        self.threshold = state["threshold"]
        self._step = []


def _above(rankable_BS: Tensor, threshold: float) -> Selection:
    mask_BS = rankable_BS >= threshold
    counts = [mask_BS.sum(), (rankable_BS > -math.inf).sum(), (rankable_BS == threshold).sum()]
    kept, eligible, ties = torch.stack(counts).tolist()
    return Selection(mask_BS, threshold, kept, eligible, ties, counted=CountedMask(mask_BS, kept))
