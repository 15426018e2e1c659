"""The specification of selection in plain Python, slow and obvious. Everything in the room is compared with it."""

import math

import torch


def top_of(tokens, keep_fraction):
    """tokens: list of (score, eligible, token_id). Returns (set of kept places, threshold, kept, eligible)."""
    ranked = [
        i for i, (score, eligible, _) in enumerate(tokens) if eligible and math.isfinite(score)
    ]
    if not ranked:
        return set(), math.inf, 0, 0
    kept = max(1, math.ceil(keep_fraction * len(ranked) - 1e-9))
    order = sorted(ranked, key=lambda i: (-tokens[i][0], tokens[i][2]))[:kept]
    return set(order), tokens[order[-1]][0], len(order), len(ranked)


def as_tokens(score, eligible, token_id=None):
    score, eligible = score.float().reshape(-1).tolist(), eligible.reshape(-1).tolist()
    ids = range(len(score)) if token_id is None else token_id.reshape(-1).tolist()
    return list(zip(score, eligible, ids, strict=True))


def expected_mask(score, eligible, keep_fraction, token_id=None):
    """The mask, and the facts, for tensors that hold the whole population."""
    places, threshold, kept, count = top_of(as_tokens(score, eligible, token_id), keep_fraction)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[sorted(places)] = True
    return mask.view(score.shape), threshold, kept, count


def awkward_scores(generator, count):
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
