"""The input of one rank's model in one forward pass.

B = sequences in this rank's micro-batch, S = sequence length in tokens (under context parallelism,
the part of it that this rank holds).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

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
    """One micro-batch. Columns are aligned with labels: columns[c][b, s] is of labels_BS[b, s]."""

    tokens_BS: Tensor
    """int64"""
    labels_BS: Tensor
    """int64: the token after tokens_BS."""
    loss_mask_BS: Tensor
    """fp32, 1 = counts; 0 where the label is the first token of a document and at padding."""
    position_ids_BS: Tensor
    """int64: position in the sequence; where documents are isolated, position in the part of the
    document that this sequence holds.
    """
    token_id_BS: Tensor
    """int64: (index of the sample in the global batch) x S + position. It is the same in every
    parallel layout, and decides between equal scores.
    """
    corpus_id_B: Tensor
    """int64: index in data.train."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [B, S] per stored column; NaN = no score."""
    document_start_BS: Tensor | None = None
    """int64: where in the whole sequence the document of each input token begins; None = documents
    are packed and attention is causal.
    """
    offsets_BS: Tensor | None = None
    """int64: absolute token offset of each label in its corpus, -1 at padding; None unless the
    dataset was made with `with_offsets`.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `function` to every [B, S] tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_BS")}
        changed: dict[str, Any] = {
            name: function(tensor) for name, tensor in tensors.items() if tensor is not None
        }
        changed["columns"] = {name: function(column) for name, column in self.columns.items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> "Batch":
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, corpus_id_B=self.corpus_id_B.to(device, non_blocking=True))


def collate(
    samples: Sequence[dict[str, np.ndarray]], indices_in_global_batch: Sequence[int]
) -> Batch:
    """Stack samples of a ScoredDataset.

    indices_in_global_batch: the positions of the samples in the step.
    """
    stacked = {name: _stack(samples, name) for name in samples[0]}
    length = stacked["tokens"].shape[1]
    index_B = torch.tensor(indices_in_global_batch, dtype=torch.int64)
    token_id_BS = index_B[:, None] * length + torch.arange(length)
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


def plain_batch(tokens_BS: np.ndarray, labels_BS: np.ndarray) -> Batch:
    """A batch of tokens and the tokens after them, int64, all of which count; documents are
    packed.
    """
    sequences, length = tokens_BS.shape
    positions_BS = torch.arange(length).repeat(sequences, 1)
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels_BS),
        loss_mask_BS=torch.ones(tokens_BS.shape),
        position_ids_BS=positions_BS,
        token_id_BS=positions_BS,
        corpus_id_B=torch.zeros(sequences, dtype=torch.int64),
    )


def _stack(samples: Sequence[dict[str, np.ndarray]], name: str) -> Tensor:
    return torch.from_numpy(np.stack([sample[name] for sample in samples]))


def masked_sample(like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample of the same shape in which no token counts.

    It fills the last global batch when a whole corpus is validated.
    """
    sample = {}
    for name, value in like.items():
        is_score = name not in SAMPLE_KEYS
        sample[name] = np.full_like(value, np.nan) if is_score else np.zeros_like(value)
    sample["position_ids"] = like["position_ids"]
    if "offsets" in like:
        sample["offsets"] = np.full_like(like["offsets"], -1)
    return sample


def slice_for_context_parallel(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """The part of this context-parallel rank: of 2 cp_size equal chunks of S, the chunks cp_rank
    and 2 cp_size - 1 - cp_rank.

    These are the head-tail pairs of megatron-core's get_batch_on_this_cp_rank, which balance causal
    attention. Every [B, S] tensor is cut alike: tokens, labels, masks, positions, token ids and
    scores. ValueError when 2 cp_size does not divide S.
    """
    if cp_size == 1:
        return batch
    length = batch.tokens_BS.shape[1]
    if length % (2 * cp_size):
        raise ValueError(
            f"data.sequence_length is {length}; with parallel.context {cp_size} it must be a "
            f"multiple of {2 * cp_size}."
        )
    return batch.map(lambda tensor_BS: head_and_tail(tensor_BS, cp_rank, cp_size))


def head_and_tail(tensor_BS: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """One [B, S] tensor's part of slice_for_context_parallel; 2 cp_size must divide S, unless
    cp_size is 1, which leaves all of it.
    """
    chunks = tensor_BS.chunk(2 * cp_size, dim=1)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=1)


def hidden_from(document_start_BS: Tensor, cp_rank: int = 0, cp_size: int = 1) -> Tensor:
    """The attention mask of isolated documents: bool [B, 1, S, S * cp_size], True = hidden.

    A token does not see later tokens, nor those of an earlier document. Rows are this rank's tokens
    (document_start_BS holds this rank's part), columns the whole sequence in order. The mask takes
    one byte per pair of tokens, once per micro-batch and pipeline stage.
    """
    key = torch.arange(document_start_BS.shape[1] * cp_size, device=document_start_BS.device)
    query_BS = key[None] if cp_size == 1 else head_and_tail(key[None], cp_rank, cp_size)
    return ((key > query_BS[..., None]) | (key < document_start_BS[..., None]))[:, None]
