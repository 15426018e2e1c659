"""Sums and counts that describe a choice. A ratio is formed once, at the end, of the sums over all ranks and micro-batches.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this rank.

    measured = describe(columns, score_BS, eligible_BS, selection, sequence_length=..., corpora=...)     per micro-batch, on the device
    total = add(total, measured)                                                                         over micro-batches
    flat = pack(total); all_reduce(flat); summary = summarise(unpack(flat, total))                       once per interval
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_slm.selection.select import Selection

MetricSums = dict[str, tuple[Tensor, Tensor]]

POSITION_BUCKETS = 16
QUANTILES = 20
# Reference losses are counted in fixed bins, fine near 0 and 2 % wide above 0.01 nats, so that counts of ranks and steps can be added.
# Bin i spans [edge(i), edge(i+1)) with edge(i) = (exp(i * BIN_STEP) - 1) / BIN_SCALE nats; the last bin is open (above 21 nats).
LOSS_BINS = 512
BIN_SCALE = 1000.0
BIN_STEP = math.log1p(BIN_SCALE * 21.0) / (LOSS_BINS - 1)
# Reported as totals of the interval; their share of all trained tokens is added under the name + "_fraction".
TOTALS = ("selection/without_score", "selection/non_finite_scores")


def describe(
    columns: Mapping[str, Tensor],
    score_BS: Tensor | None,
    eligible_BS: Tensor,
    selection: Selection,
    *,
    sequence_length: int | None = None,
    corpora: int = 0,
    loss_of_selected_only: bool = False,
) -> MetricSums:
    """This rank's sums of one choice: name -> (sum, count), float64, on the device, 0-d or histograms.

    columns          "loss"; "reference_loss" and "position", "corpus_id" when there are any (what is absent is not described).
    score_BS         what was ranked; None when the scorer ranks nothing.
    sequence_length  tokens of a whole sequence: cuts positions into 16 buckets.  corpora: number of corpora in the blend.
    loss_of_selected_only   columns["loss"] means something for selected tokens only: what needs the others' is left out, not guessed.
    No host synchronisation, no collective: about 20 element-wise passes and one histogram.
    """
    loss_BS = columns["loss"].detach()
    eligible_BS, chosen_BS = eligible_BS.bool(), selection.choice
    # NaN where it was not computed would read as a broken loss; 0 is finite, and nothing below takes its value.
    loss_BS = torch.where(chosen_BS, loss_BS, 0.0) if loss_of_selected_only else loss_BS
    measured = _choice(score_BS, loss_BS, eligible_BS, selection)
    by_selection = _loss_by_selection(
        "loss/{}", loss_BS, eligible_BS & loss_BS.isfinite(), chosen_BS
    )
    measured |= (
        {"loss/selected": by_selection["loss/selected"]} if loss_of_selected_only else by_selection
    )
    reference_BS = columns.get("reference_loss")
    if reference_BS is not None:
        scored_BS = eligible_BS & reference_BS.isfinite() & loss_BS.isfinite()
        measured |= _loss_by_selection("loss/reference_{}", reference_BS, scored_BS, chosen_BS)
        measured["loss/reference"] = measured.pop("loss/reference_all")
    if reference_BS is not None and not loss_of_selected_only:
        excess_BS = torch.where(scored_BS, loss_BS - reference_BS, 0.0)
        scored = scored_BS.sum().double()
        measured["selection/positive_excess_fraction"] = ((excess_BS > 0).sum().double(), scored)
        measured["selection/absolute_excess_nats"] = (
            excess_BS.abs().sum(dtype=torch.float64),
            scored,
        )
    measured |= _rates(columns, eligible_BS, chosen_BS, sequence_length, corpora)
    return measured


def _choice(
    score_BS: Tensor | None, loss_BS: Tensor, eligible_BS: Tensor, selection: Selection
) -> MetricSums:
    trained = eligible_BS.sum().double()
    competing_BS = eligible_BS if score_BS is None else eligible_BS & score_BS.isfinite()
    zero, one = trained.new_zeros(()), trained.new_ones(())
    known = math.isfinite(selection.threshold)
    measured = {
        "selection/kept_fraction": (selection.choice.sum().double(), competing_BS.sum().double()),
        "selection/threshold_nats": (zero + selection.threshold, one) if known else (zero, zero),
        "selection/ties": (zero + selection.ties, one),
        "selection/tied_fraction": (zero + selection.ties, zero + selection.eligible),
    }
    if score_BS is not None:
        unscored = (eligible_BS & score_BS.isnan() & loss_BS.isfinite()).sum().double()
        broken = (eligible_BS & (score_BS.isinf() | ~loss_BS.isfinite())).sum().double()
        measured["selection/without_score"] = (unscored, trained)
        measured["selection/non_finite_scores"] = (broken, trained)
    return measured


def _loss_by_selection(
    name: str, value_BS: Tensor, known_BS: Tensor, chosen_BS: Tensor
) -> MetricSums:
    value_BS = torch.where(known_BS, value_BS, 0.0)  # a NaN times 0 is a NaN
    kept_BS = known_BS & chosen_BS
    total, count = value_BS.sum(dtype=torch.float64), known_BS.sum().double()
    kept_total, kept_count = (value_BS * kept_BS).sum(dtype=torch.float64), kept_BS.sum().double()
    return {
        name.format("all"): (total, count),
        name.format("selected"): (kept_total, kept_count),
        name.format("rejected"): (total - kept_total, count - kept_count),
    }


def _rates(
    columns: Mapping[str, Tensor],
    eligible_BS: Tensor,
    chosen_BS: Tensor,
    sequence_length: int | None,
    corpora: int,
) -> MetricSums:
    """(selected, eligible) per bin of reference loss, bucket of position and corpus: one histogram for all of them."""
    bins: list[tuple[str, Tensor, Tensor, int]] = []
    reference_BS = columns.get("reference_loss")
    if reference_BS is not None:
        known_BS = eligible_BS & reference_BS.isfinite()
        bins.append(
            (
                "selection/by_reference_loss",
                _loss_bin(torch.where(known_BS, reference_BS, 0.0)),
                known_BS,
                LOSS_BINS,
            )
        )
    if sequence_length is not None and "position" in columns:
        bucket_BS = (columns["position"] * POSITION_BUCKETS // sequence_length).clamp(
            0, POSITION_BUCKETS - 1
        )
        bins.append(("selection/by_position", bucket_BS, eligible_BS, POSITION_BUCKETS))
    if corpora > 0 and "corpus_id" in columns:
        corpus_id = columns["corpus_id"]
        corpus_BS = (corpus_id if corpus_id.dim() == 2 else corpus_id[:, None]).expand(
            eligible_BS.shape
        )
        bins.append(("selection/by_corpus", corpus_BS.clamp(0, corpora - 1), eligible_BS, corpora))
    return _count_bins(bins, chosen_BS)


def _count_bins(bins: list[tuple[str, Tensor, Tensor, int]], chosen_BS: Tensor) -> MetricSums:
    """Each group of n bins takes 3 n places: tokens that do not count, rejected ones, selected ones."""
    indices, starts, start = [], {}, 0
    for name, bin_BS, known_BS, size in bins:
        fate_BS = known_BS.long() * (1 + chosen_BS.long())
        indices.append((bin_BS.long() + fate_BS * size + start).reshape(-1))
        starts[name] = (start, size)
        start += 3 * size
    if not indices:
        return {}
    index_N = torch.cat(indices)
    counts = torch.zeros(start, dtype=torch.float64, device=index_N.device)
    counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.float64))
    measured = {}
    for name, (begin, size) in starts.items():
        _, rejected, selected = counts[begin : begin + 3 * size].view(3, size)
        measured[name] = (selected, selected + rejected)
    return measured


def _loss_bin(loss_BS: Tensor) -> Tensor:
    return (
        (torch.log1p(BIN_SCALE * loss_BS.float().clamp(min=0.0)) / BIN_STEP)
        .long()
        .clamp(max=LOSS_BINS - 1)
    )


def add(total: MetricSums | None, measured: MetricSums) -> MetricSums:
    """Element-wise sum of two descriptions; a name that only one of them has is kept."""
    result = dict(total or {})
    for name, (value, count) in measured.items():
        result[name] = (
            (result[name][0] + value, result[name][1] + count) if name in result else (value, count)
        )
    return result


def pack(measured: MetricSums) -> Tensor:
    """All sums and counts in one float64 vector, so that one all-reduce adds them over ranks."""
    return torch.cat(
        [
            torch.cat([value.reshape(-1), count.reshape(-1)]).double()
            for value, count in measured.values()
        ]
    )


def unpack(flat: Tensor, like: MetricSums) -> MetricSums:
    """Inverse of pack; `like` gives names and shapes."""
    result, start = {}, 0
    for name, (value, _) in like.items():
        end = start + 2 * value.numel()
        result[name] = tuple(flat[start:end].view(2, *value.shape))
        start = end
    return result


def summarise(reduced: MetricSums) -> dict[str, float | list[float]]:
    """The metrics of reduced sums, under their names in metrics.jsonl. Pure; one host synchronisation. A ratio over nothing is left out."""
    if not reduced:  # a pipeline stage without losses
        return {}
    host = unpack(pack(reduced).cpu(), reduced)
    summary: dict[str, float | list[float]] = {}
    for name, (value, count) in host.items():
        if value.dim() > 0:
            continue
        if name in TOTALS:
            summary[name] = float(value)
        if count > 0:
            summary[name + "_fraction" * (name in TOTALS)] = float(value / count)
    if "selection/by_reference_loss" in host:
        rates, edges = rate_by_quantile(*host["selection/by_reference_loss"])
        if rates:
            summary["selection/rate_by_reference_loss"] = rates
            summary["selection/rate_by_reference_loss_edges_nats"] = edges
    for name in ("position", "corpus"):
        if f"selection/by_{name}" in host:
            selected, all_ = host[f"selection/by_{name}"]
            summary[f"selection/rate_by_{name}"] = [
                float(s / n) if n else math.nan for s, n in zip(selected, all_, strict=True)
            ]
    return summary


def rate_by_quantile(
    selected: Tensor, total: Tensor, quantiles: int = QUANTILES
) -> tuple[list[float], list[float]]:
    """(selection rate of each of 20 equally full classes of reference loss, their 21 edges in nats), from counts in the fixed bins.

    Inside a bin tokens are taken as evenly spread, so edges are exact to the bin's width. Empty lists when nothing was counted.
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


class ChoiceOverlap:
    """How much the choice on a fixed set of probe tokens changes from one evaluation to the next."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def compare(self, mask: Tensor) -> MetricSums:
        """(tokens in both choices, tokens in either) as selection/probe_overlap_fraction; nothing at the first evaluation.

        Raises ValueError when the probe set has another size than before.
        """
        before, self.mask = self.mask, mask.detach().bool().cpu()
        if before is None:
            return {}
        if before.shape != self.mask.shape:
            raise ValueError(
                f"the probe set had the shape {tuple(before.shape)} and now has {tuple(self.mask.shape)}; it must stay the same"
            )
        both, either = (before & self.mask).sum().double(), (before | self.mask).sum().double()
        return {"selection/probe_overlap_fraction": (both.to(mask.device), either.to(mask.device))}

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"mask": self.mask}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.mask = state["mask"]
