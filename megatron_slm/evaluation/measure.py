"""Sums of losses, tokens and bytes over corpora and frozen sets of their tokens."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_slm.data.batch import Batch
from megatron_slm.data.corpora import Corpus
from megatron_slm.data.loader import SampleSource, ValidationLoader
from megatron_slm.data.scored_dataset import validation_dataset
from megatron_slm.evaluation.job import EvaluationJob
from megatron_slm.evaluation.token_sets import fingerprint_of
from megatron_slm.parallel import Groups
from megatron_slm.scoring.progress import ProgressBar
from megatron_slm.tokenization.token_bytes import token_bytes
from megatron_slm.training.evaluate import (
    LossesOf,
    Measure,
    loss_where,
    plain_metrics,
    token_sums,
)
from megatron_slm.training.rank_batches import ValidationOnThisRank

BITS_PER_NAT = 1 / math.log(2)


class FirstSamples:
    """The first samples of a dataset: what a limit on sequences reads, in every layout."""

    def __init__(self, dataset: SampleSource, limit: int):
        self.dataset = dataset
        self.size = min(limit, len(dataset)) if limit else len(dataset)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.dataset[index]

    def pieces(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        return self.dataset.pieces(index)


def measure_corpora(
    job: EvaluationJob, losses_of: LossesOf, groups: Groups
) -> tuple[dict[str, float], dict[str, str]]:
    """(metrics by their names in training, fingerprints of the token sets by corpus/set).

    Every rank calls it. Known on last-stage ranks, the logger among them; others get no metrics.
    """
    data = job.config.data
    datasets = {name: _dataset(job, corpus) for name, corpus in job.corpora.items()}
    sequences = {name: len(dataset) for name, dataset in datasets.items()}
    bytes_V = None if job.tokenizer is None else torch.from_numpy(token_bytes(job.tokenizer))
    metrics: dict[str, float] = {}
    fingerprints: dict[str, str] = {}
    total_tokens = sum(sequences.values()) * data.sequence_length
    rank_tokens = -(-total_tokens // groups.dp_size)
    work = ("evaluating", "evaluated")
    with ProgressBar(total_tokens, rank_tokens, shown=groups.is_logger, work=work) as progress:
        for name, dataset in datasets.items():
            members = {each.name: each.members() for each in job.token_sets[name]}
            fingerprints |= {f"{name}/{key}": fingerprint_of(of) for key, of in members.items()}
            loader = ValidationLoader(
                dataset,
                global_batch_size=data.global_batch_size,
                micro_batch_size=data.micro_batch_size,
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
            )
            steps = _counted(ValidationOnThisRank(loader, groups), progress, groups.cp_size)
            metrics |= _measure(name, losses_of, steps, groups, bytes_V, members)
    return metrics, fingerprints


def _dataset(job: EvaluationJob, corpus: Corpus) -> FirstSamples:
    data = job.config.data
    dataset = validation_dataset(
        corpus,
        sequence_length=data.sequence_length,
        index_cache=job.options.index_cache or None,
        isolate_documents=data.document_policy == "isolated",
        with_offsets=True,
    )
    return FirstSamples(dataset, job.options.sequences)


def _counted(
    steps: ValidationOnThisRank, progress: ProgressBar, cp_size: int
) -> Iterator[list[Batch]]:
    """The steps, telling the progress bar when each is done."""
    for batches in steps:
        yield batches
        progress.advance(cp_size * sum(batch.tokens_BS.numel() for batch in batches))


def _measure(
    name: str,
    losses_of: LossesOf,
    steps: Iterator[list[Batch]],
    groups: Groups,
    bytes_V: Tensor | None,
    members: dict[str, np.ndarray],
) -> dict[str, float]:
    """The metrics of one corpus; {} off the last pipeline stage."""
    measures: list[Measure] = loss_where(None)
    for of_set in members.values():
        measures += loss_where(partial(_belongs, torch.from_numpy(of_set).to(groups.device)))
    if bytes_V is not None:
        bytes_V = bytes_V.to(groups.device)
        measures.append(partial(_known_bytes, bytes_V))
        measures.append(partial(_is_unknown, bytes_V))
    sums = token_sums(losses_of, steps, groups, measures)
    if sums is None:
        return {}
    loss_sum, tokens = sums[:2]
    metrics = plain_metrics(name, loss_sum / tokens if tokens else math.nan, int(tokens))
    for number, set_name in enumerate(members, start=1):
        of_set_sum, of_set_tokens = sums[2 * number : 2 * number + 2]
        metrics[f"validation/{name}/{set_name}/tokens"] = int(of_set_tokens)
        if of_set_tokens:
            metrics[f"validation/{name}/{set_name}/loss"] = of_set_sum / of_set_tokens
    if bytes_V is not None:
        metrics |= _bits_per_byte(name, loss_sum, sums[-2:])
    return metrics


def _bits_per_byte(name: str, loss_sum: float, counts: Sequence[float]) -> dict[str, float]:
    """Bits per byte; where tokens are unknown, and their bytes lost, how many these are."""
    size_bytes, unknown_tokens = counts
    if unknown_tokens:
        return {f"validation/{name}/unknown_tokens": int(unknown_tokens)}
    metrics: dict[str, float] = {f"validation/{name}/bytes": int(size_bytes)}
    if size_bytes:
        metrics[f"validation/{name}/bits_per_byte"] = loss_sum * BITS_PER_NAT / size_bytes
    return metrics


def _belongs(members: Tensor, batch: Batch) -> Tensor:
    """bool [B, S]: whether each label is a member. Padding has the offset -1 and does not count."""
    assert batch.offsets_BS is not None  # the dataset was made with them
    return members[batch.offsets_BS]


def _known_bytes(bytes_V: Tensor, batch: Batch, _: Tensor) -> Tensor:
    return bytes_V[batch.labels_BS].clamp(min=0)


def _is_unknown(bytes_V: Tensor, batch: Batch, _: Tensor) -> Tensor:
    return bytes_V[batch.labels_BS] < 0
