"""The model that is evaluated: a checkpoint in any layout, or any causal model of transformers,
whole in every process.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_slm.data.batch import Batch
from megatron_slm.evaluation.job import EvaluationJob
from megatron_slm.parallel import Groups
from megatron_slm.scoring.foreign_model import transformers_columns
from megatron_slm.scoring.reference import load_scoring_model
from megatron_slm.training.evaluate import LossesOf, losses_of_models


def load_losses(job: EvaluationJob, groups: Groups) -> LossesOf:
    """The per-token losses of the job's model. Every rank calls it."""
    if job.checkpoint is not None:
        models = load_scoring_model(job.checkpoint, job.config, groups)
        return losses_of_models(models, groups)
    columns_of = transformers_columns(
        job.options.huggingface,
        ("loss",),
        vocabulary_size=max(
            corpus.manifest.tokenizer["vocabulary_size"] for corpus in job.corpora.values()
        ),
        precision=job.config.device.precision,
        device=groups.device,
    )

    def losses_of(batches: Sequence[Batch]) -> list[Tensor]:
        return [_losses(batch) for batch in batches]

    def _losses(batch: Batch) -> Tensor:
        if batch.document_start_BS is None:
            return columns_of(batch.tokens_BS, batch.labels_BS)["loss"]
        loss_BS = torch.zeros(batch.tokens_BS.shape, device=groups.device)
        for row, start, end in _documents(batch.document_start_BS):
            tokens = batch.tokens_BS[row : row + 1, start:end]
            labels = batch.labels_BS[row : row + 1, start:end]
            loss_BS[row, start:end] = columns_of(tokens, labels)["loss"][0]
        return loss_BS

    return losses_of


def _documents(document_start_BS: Tensor) -> Iterator[tuple[int, int, int]]:
    """(row, start, end) of the part of each document in a batch.

    Each part is read alone, so the same holds for models without a mask of isolated documents,
    whatever their positions are; it costs one forward pass per part.
    """
    length = document_start_BS.shape[1]
    for row, starts_S in enumerate(document_start_BS.tolist()):
        starts = sorted(set(starts_S))
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            yield row, start, end
