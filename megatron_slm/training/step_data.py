"""Writes down the data of one step: documents, token ranges, losses and scores of every sequence.

B: sequences of this rank's micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_slm.data.batch import Batch
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.step_choices import with_reference_losses


def write_step_data(
    run: RunParts, folder: Path, batches: Sequence[Batch], first_sample: int
) -> None:
    """One file per data-parallel rank; every rank of the job calls it with its own batches.

    The losses are those of the present weights, by one more forward pass (two with an online
    reference). first_sample: of the global batch, as the loader counts.
    """
    with torch.no_grad():
        batches = with_reference_losses(run.trainer, batches)
        outputs = forward_losses(run.trainer.models, batches, run.groups)
    groups = run.groups
    if not (groups.is_last_stage and groups.tp_rank == 0 and groups.cp_rank == 0):
        return
    sequences = []
    for batch, output in zip(batches, outputs, strict=True):
        sequences += [
            _describe(run, batch, output["loss"], row, first_sample)
            for row in range(len(batch.tokens_BS))
        ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / f"data_parallel_rank_{groups.dp_rank:05d}.json", sequences)
    except OSError as error:
        run.reporter.message(f"{folder} could not be written ({error})", "warning")


def _describe(
    run: RunParts, batch: Batch, loss_BS: torch.Tensor, row: int, first_sample: int
) -> dict[str, Any]:
    """One sequence: where it stands in its corpus, and the range of its values (of this
    context-parallel rank).
    """
    sequence_tokens = run.config.data.sequence_length
    sample = first_sample + int(batch.token_id_BS[row, 0]) // sequence_tokens
    number, pieces = run.loader.dataset.pieces(sample)
    corpus = run.run_inputs.corpora[number]
    index = run.loader.corpus_index(number)
    columns = {"loss": loss_BS, **batch.columns}
    summaries = {name: _summary(value_BS[row]) for name, value_BS in columns.items()}
    return {
        "corpus": str(corpus.prefix),
        "sample": sample,
        "token_ranges": list(map(list, pieces)),
        "documents": [index.document_at(start) for start, _ in pieces],
        "columns": summaries,
    }


def _summary(value_S: torch.Tensor) -> dict[str, float]:
    """Range and mean of the finite values, and how many are not."""
    value_S = value_S.detach().float().cpu()
    finite = value_S[value_S.isfinite()]
    summary: dict[str, float] = {"not_finite": int((~value_S.isfinite()).sum())}
    if len(finite):
        summary |= {
            "lowest": float(finite.min()),
            "mean": float(finite.mean()),
            "highest": float(finite.max()),
        }
    return summary
