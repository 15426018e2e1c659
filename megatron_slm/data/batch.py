"""What one rank feeds the model in one forward pass.

B = sequences in this rank's micro-batch, S = sequence length in tokens (this rank's part of it under context parallelism).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

SAMPLE_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "corpus_id",
    "offsets",
    "document_start",
)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. columns are aligned with labels: columns[c][b, s] belongs to the token labels_BS[b, s]."""

    tokens_BS: Tensor
    """int64"""
    labels_BS: Tensor
    """int64: the token after tokens_BS."""
    loss_mask_BS: Tensor
    """fp32, 1 = counts; 0 where the label is the first token of a document and at padding."""
    position_ids_BS: Tensor
    """int64: place in the sequence; where documents are isolated, place in this sequence's part of the document."""
    token_id_BS: Tensor
    """int64: (index of the sample in the global batch) x S + position. The same in every parallel layout; breaks ties."""
    corpus_id_B: Tensor
    """int64: index in data.train."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [B, S] per stored column; NaN = no score."""
    document_start_BS: Tensor | None = None
    """int64: where in the whole sequence the document of each input token begins; None = documents are packed, attention is causal."""
    offsets_BS: Tensor | None = None
    """int64: absolute token offset of each label in its corpus, -1 at padding; only when the dataset was asked for it."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `function` to every [B, S] tensor."""
        changed = {
            f.name: function(getattr(self, f.name))
            for f in fields(self)
            if f.name.endswith("_BS") and getattr(self, f.name) is not None
        }
        return replace(
            self,
            **changed,
            columns={name: function(column) for name, column in self.columns.items()},
        )

    def to(self, device: torch.device | str) -> "Batch":
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, corpus_id_B=self.corpus_id_B.to(device, non_blocking=True))


def collate(
    samples: Sequence[dict[str, np.ndarray]], indices_in_global_batch: Sequence[int]
) -> Batch:
    """Stack samples of a ScoredDataset; indices_in_global_batch gives each its place in the step's global batch."""
    stacked = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
        for name in samples[0]
    }
    length = stacked["tokens"].shape[1]
    token_id_BS = torch.tensor(indices_in_global_batch, dtype=torch.int64)[
        :, None
    ] * length + torch.arange(length)
    return Batch(
        tokens_BS=stacked["tokens"],
        labels_BS=stacked["labels"],
        loss_mask_BS=stacked["loss_mask"],
        position_ids_BS=stacked["position_ids"],
        token_id_BS=token_id_BS,
        corpus_id_B=stacked["corpus_id"],
        columns={name: value for name, value in stacked.items() if name not in SAMPLE_KEYS},
        document_start_BS=stacked.get("document_start"),
        offsets_BS=stacked.get("offsets"),
    )


def masked_sample(like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample of the same shape in which nothing counts: fills the last global batch of a whole-corpus validation."""
    sample = {
        name: np.full_like(value, np.nan) if name not in SAMPLE_KEYS else np.zeros_like(value)
        for name, value in like.items()
    }
    return {
        **sample,
        "position_ids": like["position_ids"],
        **({"offsets": np.full_like(like["offsets"], -1)} if "offsets" in like else {}),
    }


def slice_for_context_parallel(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """This context-parallel rank's part: chunks cp_rank and 2 cp_size - 1 - cp_rank of the 2 cp_size equal chunks of S.

    The head-tail pairs of megatron-core's get_batch_on_this_cp_rank, which balance causal attention, applied to every [B, S]
    tensor alike: tokens, labels, masks, positions, token ids and scores. ValueError when 2 cp_size does not divide S.
    """
    if cp_size == 1:
        return batch
    length = batch.tokens_BS.shape[1]
    if length % (2 * cp_size):
        raise ValueError(
            f"data.sequence_length is {length}; with parallel.context {cp_size} it must be a multiple of {2 * cp_size}."
        )

    return batch.map(lambda tensor_BS: _head_and_tail(tensor_BS, cp_rank, cp_size))


def _head_and_tail(tensor_BS: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    chunks = tensor_BS.chunk(2 * cp_size, dim=1)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=1)


def hidden_from(document_start_BS: Tensor, cp_rank: int = 0, cp_size: int = 1) -> Tensor:
    """The attention mask of isolated documents, bool [B, 1, S, S * cp_size], True = hidden: what is later, or of an earlier document.

    Rows are this rank's tokens (of which document_start_BS is this rank's part), columns the whole sequence in order. Costs one byte per
    pair of tokens, once per micro-batch and pipeline stage.
    """
    key = torch.arange(document_start_BS.shape[1] * cp_size, device=document_start_BS.device)
    query_BS = key[None] if cp_size == 1 else _head_and_tail(key[None], cp_rank, cp_size)
    return ((key > query_BS[..., None]) | (key < document_start_BS[..., None]))[:, None]
