"""How often tokens are selected: by reference loss, by position in the sequence, and by corpus.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this rank.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_slm.selection.metric_sums import MetricSums

POSITION_BUCKETS = 16
QUANTILES = 20
# Reference losses are counted in fixed bins, fine near 0 and 2 % wide above 0.01 nats, so that
# counts of ranks and steps can be added. Bin i spans [edge(i), edge(i+1)) with
# edge(i) = (exp(i * BIN_STEP) - 1) / BIN_SCALE nats; the last bin is open (above 21 nats).
LOSS_BINS = 512
BIN_SCALE = 1000.0
BIN_STEP = math.log1p(BIN_SCALE * 21.0) / (LOSS_BINS - 1)


class _Bins(NamedTuple):
    """How tokens are counted into the bins of one histogram."""

    name: str
    bin_BS: Tensor
    known_BS: Tensor
    """Tokens that count at all."""
    size: int


def rate_sums(
    columns: Mapping[str, Tensor],
    eligible_BS: Tensor,
    chosen_BS: Tensor,
    sequence_length: int | None,
    corpora: int,
) -> MetricSums:
    """(selected, eligible) per bin of reference loss, bucket of position and corpus: one histogram
    for all of them.
    """
    bins: list[_Bins] = []
    reference_BS = columns.get("reference_loss")
    if reference_BS is not None:
        known_BS = eligible_BS & reference_BS.isfinite()
        bin_BS = _loss_bin(torch.where(known_BS, reference_BS, 0.0))
        bins.append(_Bins("selection/by_reference_loss", bin_BS, known_BS, LOSS_BINS))
    if sequence_length is not None and "position" in columns:
        bucket_BS = columns["position"] * POSITION_BUCKETS // sequence_length
        bucket_BS = bucket_BS.clamp(0, POSITION_BUCKETS - 1)
        bins.append(_Bins("selection/by_position", bucket_BS, eligible_BS, POSITION_BUCKETS))
    if corpora > 0 and "corpus_id" in columns:
        corpus_id = columns["corpus_id"]
        corpus_id = corpus_id if corpus_id.dim() == 2 else corpus_id[:, None]
        corpus_BS = corpus_id.expand(eligible_BS.shape).clamp(0, corpora - 1)
        bins.append(_Bins("selection/by_corpus", corpus_BS, eligible_BS, corpora))
    return _count_bins(bins, chosen_BS)


def _count_bins(bins: list[_Bins], chosen_BS: Tensor) -> MetricSums:
    """Each group of n bins takes 3 n places: tokens that do not count, rejected ones, selected
    ones.
    """
    if not bins:
        return {}
    indices = []
    start = 0
    for group in bins:
        third_BS = group.known_BS.long() * (1 + chosen_BS.long())
        indices.append((group.bin_BS.long() + third_BS * group.size + start).reshape(-1))
        start += 3 * group.size
    index_N = torch.cat(indices)
    counts = torch.zeros(start, dtype=torch.float64, device=index_N.device)
    counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.float64))
    measured = {}
    for group, thirds in zip(bins, counts.split([3 * group.size for group in bins]), strict=True):
        _, rejected, selected = thirds.view(3, group.size)
        measured[group.name] = (selected, selected + rejected)
    return measured


def _loss_bin(loss_BS: Tensor) -> Tensor:
    place_BS = torch.log1p(BIN_SCALE * loss_BS.float().clamp(min=0.0)) / BIN_STEP
    return place_BS.long().clamp(max=LOSS_BINS - 1)


def rate_by_quantile(
    selected: Tensor, total: Tensor, quantiles: int = QUANTILES
) -> tuple[list[float], list[float]]:
    """(selection rate of each of 20 equally full classes of reference loss, their 21 edges in
    nats), from counts in the fixed bins.

    Inside a bin tokens are taken as evenly spread, so edges are exact to the bin's width. Empty
    lists when nothing was counted.
    """
    tokens = float(total.sum())
    if tokens == 0:
        return [], []
    edge_nats = torch.expm1(torch.arange(LOSS_BINS + 1, dtype=torch.float64) * BIN_STEP) / BIN_SCALE
    below = torch.cat([total.new_zeros(1), total.cumsum(0)])
    selected_below = torch.cat([selected.new_zeros(1), selected.cumsum(0)])
    aim = torch.arange(quantiles + 1, dtype=torch.float64) * tokens / quantiles
    bin_ = (torch.searchsorted(below, aim, right=False) - 1).clamp(0, LOSS_BINS - 1)
    bin_[0] = int(torch.nonzero(total)[0])  # the lowest edge is where tokens begin
    share = ((aim - below[bin_]) / total[bin_].clamp(min=1.0)).clamp(0.0, 1.0)
    edges = edge_nats[bin_] + share * (edge_nats[bin_ + 1] - edge_nats[bin_])
    selected_at = selected_below[bin_] + share * selected[bin_]
    rates = selected_at.diff() / (tokens / quantiles)
    return rates.clamp(0.0, 1.0).tolist(), edges.tolist()
