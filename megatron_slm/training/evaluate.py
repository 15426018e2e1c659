"""Validation: plain loss on held-out corpora, never selected, reported per corpus."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_slm.data.batch import Batch
from megatron_slm.model.forward_backward import MegatronModule, forward_losses
from megatron_slm.parallel import Groups

LossesOf = Callable[[Sequence[Batch]], list[torch.Tensor]]
"""Micro-batches -> their per-token losses, fp32 [B, S] in nats; [] on ranks without the losses."""
Measure = Callable[[Batch, torch.Tensor], torch.Tensor]
"""(batch, loss_BS) -> a value per token, [B, S]."""


def token_sums(
    losses_of: LossesOf,
    steps: Iterable[Sequence[Batch]],
    groups: Groups,
    measures: Sequence[Measure],
) -> list[float] | None:
    """The sum of each measure over every token that counts, in all global batches of `steps` and on
    all ranks; None off the last pipeline stage.

    Each is one float64 sum of fp32 values, of loss_mask 1 only: whatever the layout, no mean of
    means is taken (docs/method.md#point-4).
    """
    totals = torch.zeros(len(measures), dtype=torch.float64, device=groups.device)
    for batches in steps:
        losses = losses_of(batches)
        for batch, loss_BS in zip(batches, losses, strict=groups.is_last_stage):
            counted_BS = batch.loss_mask_BS > 0
            for number, measure in enumerate(measures):
                values_BS = torch.where(counted_BS, measure(batch, loss_BS), 0)
                totals[number] += values_BS.sum(dtype=torch.float64)
    if not groups.is_last_stage:
        return None
    dist.all_reduce(totals, group=groups.dp_cp)
    return totals.tolist()


def loss_where(chosen: Callable[[Batch], torch.Tensor] | None) -> list[Measure]:
    """The two measures of a mean loss: loss, and tokens.

    chosen: a bool tensor [B, S]; only tokens for which it is true count. None = every token.
    """
    if chosen is None:
        return [lambda _, loss_BS: loss_BS, lambda _, loss_BS: torch.ones_like(loss_BS)]
    return [
        lambda batch, loss_BS: torch.where(chosen(batch), loss_BS, 0.0),
        lambda batch, _: chosen(batch),
    ]


def losses_of_models(models: Sequence[MegatronModule], groups: Groups) -> LossesOf:
    """The losses that our own model gives, in any layout."""

    def losses_of(batches: Sequence[Batch]) -> list[torch.Tensor]:
        return [output["loss"] for output in forward_losses(models, batches, groups)]

    return losses_of


def plain_loss(
    models: Sequence[MegatronModule],
    steps: Iterable[Sequence[Batch]],
    groups: Groups,
    chosen: Callable[[Batch], torch.Tensor] | None = None,
) -> tuple[float, int]:
    """(mean loss in nats, tokens) over all global batches in `steps` and all ranks: one sum divided
    by one count.

    Equals cross_entropy over every unmasked token in one process. Known on last-stage ranks; others
    get (nan, 0).
    chosen: a bool tensor [B, S]; only tokens for which it is true count. None = every token.
    """
    sums = token_sums(losses_of_models(models, groups), steps, groups, loss_where(chosen))
    if sums is None:
        return float("nan"), 0
    loss_sum, count = sums
    return (loss_sum / count if count else float("nan")), int(count)


PLAIN_METRICS = ("loss", "perplexity", "tokens")
"""What `validate` measures of every corpus, as validation/<name>/<metric>."""


def validate(
    models: Sequence[MegatronModule],
    loaders: Mapping[str, Iterable[Sequence[Batch]]],
    groups: Groups,
) -> dict[str, float]:
    """Metrics of every validation corpus: validation/<name>/loss, /perplexity and /tokens.

    Where none of the tokens that were read counts, there is no loss: the first two are left out.
    """
    record: dict[str, float] = {}
    for name, loader in loaders.items():
        loss, tokens = plain_loss(models, loader, groups)
        record |= plain_metrics(name, loss, tokens)
    return record


def plain_metrics(name: str, loss: float, tokens: int) -> dict[str, float]:
    """The PLAIN_METRICS of a corpus. Where no token counts, there is no loss: it and perplexity are
    left out.
    """
    record: dict[str, float] = {f"validation/{name}/tokens": tokens}
    if tokens:
        record[f"validation/{name}/loss"] = loss
        record[f"validation/{name}/perplexity"] = float(torch.tensor(loss).exp())
    return record


def losses_in(record: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The losses of these corpora in a record of `validate`."""
    keys = {name: f"validation/{name}/loss" for name in names}
    return {name: record[key] for name, key in keys.items() if key in record}


def nothing_counted(names: Iterable[str], losses: Mapping[str, float]) -> str | None:
    """A warning if a corpus that was read has no loss, on ranks that know the losses; else None."""
    empty = [name for name in names if name not in losses]
    if not empty:
        return None
    return (
        f"validation on {', '.join(empty)} has no loss: in the batches that are read no document "
        "has a second token, and the first token of a document never counts. Raise "
        "monitoring.validation_batches, or look at the corpus"
    )
