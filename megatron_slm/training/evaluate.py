"""Validation: plain loss on held-out corpora, never selected, reported per corpus."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_slm.data.batch import Batch
from megatron_slm.model.forward_backward import MegatronModule, forward_losses
from megatron_slm.parallel import Groups


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
    total = torch.zeros(2, dtype=torch.float64, device=groups.device)
    for batches in steps:
        outputs = forward_losses(models, batches, groups)
        for batch, output in zip(batches, outputs, strict=groups.is_last_stage):
            counted_BS = batch.loss_mask_BS > 0
            if chosen is not None:
                counted_BS &= chosen(batch)
            total[0] += torch.where(counted_BS, output["loss"], 0.0).sum(dtype=torch.float64)
            total[1] += counted_BS.sum()
    if not groups.is_last_stage:
        return float("nan"), 0
    dist.all_reduce(total, group=groups.dp_cp)
    loss_sum, count = total.tolist()
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
        record[f"validation/{name}/tokens"] = tokens
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
