"""The specification of selection: the top tokens found by sorting everything, in plain Python.

Slow and obvious. The library's selection, and training with it, are compared with these functions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def top_tokens(
    score: Sequence[float],
    token_id: Sequence[int],
    eligible: Sequence[bool],
    keep_fraction: float,
) -> set[int]:
    """Ids of the kept tokens: the highest scores, and of equal scores the lowest token ids.

    docs/method.md#point-5 and #point-6
    """
    return {token_id[place] for place in _kept_places(score, token_id, eligible, keep_fraction)}


def expected_mask(
    score: Tensor, eligible: Tensor, keep_fraction: float, token_id: Tensor | None = None
) -> tuple[Tensor, float, int, int]:
    """(mask, threshold, tokens kept, tokens eligible) of tensors that hold the whole population.

    Without token_id, ties go to the token that comes first.
    """
    scores = score.float().reshape(-1).tolist()
    may_be_kept = eligible.reshape(-1).tolist()
    ids = range(len(scores)) if token_id is None else token_id.reshape(-1).tolist()
    places = _kept_places(scores, ids, may_be_kept, keep_fraction)
    threshold = scores[places[-1]] if places else math.inf
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[sorted(places)] = True
    return mask.view(score.shape), threshold, len(places), len(_rankable(scores, may_be_kept))


def _kept_places(
    score: Sequence[float],
    token_id: Sequence[int],
    eligible: Sequence[bool],
    keep_fraction: float,
) -> list[int]:
    """Positions of the kept tokens, the best first; at least one where any token is eligible."""
    rankable = _rankable(score, eligible)
    if not rankable:
        return []
    kept = max(1, math.ceil(keep_fraction * len(rankable) - 1e-9))
    return sorted(rankable, key=lambda place: (-score[place], token_id[place]))[:kept]


def _rankable(score: Sequence[float], eligible: Sequence[bool]) -> list[int]:
    """Positions that take part: eligible, with a finite score."""
    return [place for place in range(len(score)) if eligible[place] and math.isfinite(score[place])]


def awkward_scores(generator: torch.Generator, count: int) -> Tensor:
    """Scores with many ties, NaN, infinities, signed zeros and subnormals among ordinary ones."""
    smooth = torch.randn(count, generator=generator) * 3.0
    coarse = torch.randint(-2, 3, (count,), generator=generator).float()
    special = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, 1.0]
    )
    odd = special[torch.randint(0, len(special), (count,), generator=generator)]
    kind = torch.randint(0, 3, (count,), generator=generator)
    mixture = torch.randint(0, 4, (1,), generator=generator).item()
    if mixture == 0:
        return smooth
    if mixture == 1:
        return coarse
    return torch.where(kind == 0, smooth, torch.where(kind == 1, coarse, odd))
