"""Sums and counts that describe a choice. A ratio is formed once, at the end, of the sums over all
ranks and micro-batches.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this rank.

    per micro-batch, on the device
        measured = describe(columns, score_BS, eligible_BS, selection, corpora=...)
    over micro-batches
        total = add(total, measured)
    once per interval
        flat = pack(total); all_reduce(flat); summary = summarise(unpack(flat, total))
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_slm.selection.metric_sums import MetricSums, pack, unpack
from megatron_slm.selection.rates import rate_by_quantile, rate_sums
from megatron_slm.selection.select import Selection

# Reported as totals of the interval; name + "_fraction" is their share of all trained tokens.
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
    """This rank's sums of one choice: name -> (sum, count), float64, on the device, 0-d or
    histograms. No host synchronisation, no collective: about 20 element-wise passes and one
    histogram.

    columns          "loss"; "reference_loss" and "position", "corpus_id" when there are any (what
                     is absent is not described).
    score_BS         what was ranked; None when the scorer ranks nothing.
    sequence_length  tokens of a whole sequence: cuts positions into 16 buckets.
    corpora          number of corpora in the blend.
    loss_of_selected_only
                     columns["loss"] means something for selected tokens only: what needs the
                     others' is left out, not guessed.
    """
    loss_BS = columns["loss"].detach()
    eligible_BS = eligible_BS.bool()
    chosen_BS = selection.choice
    if loss_of_selected_only:
        # A loss that was not computed is NaN and would count as broken; 0 is finite, and nothing
        # below takes its value.
        loss_BS = torch.where(chosen_BS, loss_BS, 0.0)
    measured = _choice(score_BS, loss_BS, eligible_BS, selection)
    known_BS = eligible_BS & loss_BS.isfinite()
    by_selection = _loss_by_selection("loss/{}", loss_BS, known_BS, chosen_BS)
    if loss_of_selected_only:
        by_selection = {"loss/selected": by_selection["loss/selected"]}
    measured |= by_selection
    reference_BS = columns.get("reference_loss")
    if reference_BS is not None:
        scored_BS = known_BS & reference_BS.isfinite()
        measured |= _loss_by_selection("loss/reference_{}", reference_BS, scored_BS, chosen_BS)
        measured["loss/reference"] = measured.pop("loss/reference_all")
        if not loss_of_selected_only:
            measured |= _excess(loss_BS, reference_BS, scored_BS)
    return measured | rate_sums(columns, eligible_BS, chosen_BS, sequence_length, corpora)


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
    """Sums of all known values, of those of selected tokens, and of those of rejected ones."""
    value_BS = torch.where(known_BS, value_BS, 0.0)  # NaN * 0 is NaN
    kept_BS = known_BS & chosen_BS
    total = value_BS.sum(dtype=torch.float64)
    count = known_BS.sum().double()
    kept_total = (value_BS * kept_BS).sum(dtype=torch.float64)
    kept_count = kept_BS.sum().double()
    return {
        name.format("all"): (total, count),
        name.format("selected"): (kept_total, kept_count),
        name.format("rejected"): (total - kept_total, count - kept_count),
    }


def _excess(loss_BS: Tensor, reference_BS: Tensor, scored_BS: Tensor) -> MetricSums:
    excess_BS = torch.where(scored_BS, loss_BS - reference_BS, 0.0)
    positive = (excess_BS > 0).sum().double()
    absolute_nats = excess_BS.abs().sum(dtype=torch.float64)
    scored = scored_BS.sum().double()
    return {
        "selection/positive_excess_fraction": (positive, scored),
        "selection/absolute_excess_nats": (absolute_nats, scored),
    }


def summarise(reduced: MetricSums) -> dict[str, float | list[float]]:
    """The metrics of reduced sums, under their names in metrics.jsonl.

    Pure; one host synchronisation. A ratio over nothing is left out.
    """
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
        by_loss, edges = rate_by_quantile(*host["selection/by_reference_loss"])
        if by_loss:
            summary["selection/rate_by_reference_loss"] = by_loss
            summary["selection/rate_by_reference_loss_edges_nats"] = edges
    for name in ("position", "corpus"):
        if f"selection/by_{name}" in host:
            selected, all_ = host[f"selection/by_{name}"]
            summary[f"selection/rate_by_{name}"] = [
                float(s / n) if n else math.nan for s, n in zip(selected, all_, strict=True)
            ]
    return summary


class ChoiceOverlap:
    """How much the choice on fixed probe tokens changes from one evaluation to the next."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def compare(self, mask: Tensor) -> MetricSums:
        """(tokens in both choices, tokens in either) as selection/probe_overlap_fraction; {} at the
        first evaluation.

        Raises ValueError when the probe set has another size than before.
        """
        before = self.mask
        self.mask = now = mask.detach().bool().cpu()
        if before is None:
            return {}
        if before.shape != now.shape:
            raise ValueError(
                f"the probe set had the shape {tuple(before.shape)} and now has "
                f"{tuple(now.shape)}; it must stay the same"
            )
        both = (before & now).sum().double().to(mask.device)
        either = (before | now).sum().double().to(mask.device)
        return {"selection/probe_overlap_fraction": (both, either)}

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"mask": self.mask}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.mask = state["mask"]
