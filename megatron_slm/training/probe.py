"""A few fixed sequences that are evaluated again and again: how much the choice changes between
evaluations, and text for a person to read.

B: the probe's sequences, S: their tokens on this context-parallel rank, T: whole sequences.
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_slm.config.schema import Config
from megatron_slm.data.batch import collate
from megatron_slm.data.scored_dataset import ScoredDataset
from megatron_slm.model.context_parallel import on_this_rank, whole_sequences
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.selection import Population, TrainingProgress
from megatron_slm.selection.diagnostics import ChoiceOverlap
from megatron_slm.training.setup import RunInputs, index_cache
from megatron_slm.training.step_choices import with_reference_losses
from megatron_slm.training.trainer import Trainer

VIEWED_SEQUENCES = 4


@dataclass(frozen=True)
class ProbeResult:
    """What the model would choose from the probe now: whole sequences, the same on every rank of
    the last stage.
    """

    selected_BT: Tensor
    loss_BT: Tensor
    reference_loss_BT: Tensor | None


class Probe:
    """One micro-batch, dealt over the corpora in turn, the same on every data-parallel rank; chosen
    from by itself (scope micro_batch).

    Of the n first corpora, where n is their number or the micro-batch's sequences, whichever is
    smaller, it holds the first samples in training order. Every rank of the model calls `evaluate`.
    A plain run has nothing to evaluate.
    """

    def __init__(self, config: Config, run_inputs: RunInputs, trainer: Trainer):
        self.run_inputs = run_inputs
        self.trainer = trainer
        self.overlap = ChoiceOverlap()
        self.usable = trainer.selector.scorer.name != "none"
        if not self.usable:
            return
        self.sources = _sources(config, run_inputs)
        rows = list(range(config.data.micro_batch_size))
        corpora = len(self.sources)
        self.whole = collate([self.sources[row % corpora][row // corpora] for row in rows], rows)
        self.text = sha256(self.whole.labels_BS.numpy().tobytes()).hexdigest()
        (self.batch,) = on_this_rank([self.whole], trainer.groups)

    def evaluate(self, progress: TrainingProgress) -> ProbeResult | None:
        """The choice on the probe and what it was made from; None off the last stage."""
        if not self.usable:
            return None
        groups = self.trainer.groups
        selector = self.trainer.selector
        (batch,) = with_reference_losses(self.trainer, [self.batch])
        outputs = forward_losses(self.trainer.models, [batch], groups, extras=selector.extras)
        if not outputs:
            return None
        population = Population("micro_batch", batch.token_id_BS, cp_group=groups.cp)
        selection = selector.choose(batch, outputs[0], progress, population)
        reference_BS = batch.columns.get("reference_loss")
        return ProbeResult(
            whole_sequences(selection.mask.float(), groups) > 0,
            whole_sequences(outputs[0]["loss"].float(), groups),
            None if reference_BS is None else whole_sequences(reference_BS.float(), groups),
        )

    def compare(self, progress: TrainingProgress) -> dict[str, float]:
        """selection/probe_overlap_fraction: tokens chosen now and at the last evaluation, over
        tokens chosen at either.
        """
        result = self.evaluate(progress)
        if result is None:
            return {}
        overlap = self.overlap.compare(result.selected_BT)
        return {
            name: float(in_both / either) for name, (in_both, either) in overlap.items() if either
        }

    def view(self, progress: TrainingProgress) -> list[dict]:
        """Lines of token_view.jsonl: text, L_theta, L_ref and the choice of a few sequences."""
        result = self.evaluate(progress)
        if result is None:
            return []
        viewed = min(VIEWED_SEQUENCES, len(self.whole.tokens_BS))
        return [self._line(result, row) for row in range(viewed)]

    def _line(self, result: ProbeResult, row: int) -> dict[str, Any]:
        tokenizer = self.run_inputs.tokenizer
        reference_BT = result.reference_loss_BT
        reference = None
        if reference_BT is not None:
            reference = [_null_for_nan(nats) for nats in reference_BT[row].tolist()]
        return {
            **self._origin(row),
            "tokens": [tokenizer.piece(int(token)) for token in self.whole.labels_BS[row]],
            "loss": result.loss_BT[row].tolist(),
            "reference_loss": reference,
            "selected": result.selected_BT[row].tolist(),
        }

    def _origin(self, row: int) -> dict:
        """Where the labels of a sequence are: their corpus, the offset of the first, and [document,
        index of its first label in the sequence].
        """
        number = int(self.whole.corpus_id_B[row])
        index = self.sources[number].corpus_index
        assert self.whole.offsets_BS is not None  # the sources are asked for offsets
        offset_T = self.whole.offsets_BS[row].tolist()
        # The first token of a document is no target. A window is never padded, so no other token is
        # masked.
        begins = {0, *np.flatnonzero(self.whole.loss_mask_BS[row] == 0).tolist()}
        return {
            "corpus": self.run_inputs.corpora[number].prefix,
            "first_token": offset_T[0],
            "documents": [[index.document_at(offset_T[place]), place] for place in sorted(begins)],
        }

    def state_dict(self) -> dict:
        """The last choice, as hex of its bits, and the digest of the tokens it was made from."""
        mask = self.overlap.mask
        if mask is None:
            return {}
        bits = np.packbits(mask.numpy()).tobytes().hex()
        return {"shape": list(mask.shape), "bits": bits, "text": self.text}

    def load_state_dict(self, state: dict) -> None:
        """Restore the last choice; comparing begins anew if the probe holds other tokens now."""
        if self.usable and state and state.get("text") == self.text:
            packed = np.frombuffer(bytes.fromhex(state["bits"]), np.uint8)
            bits = np.unpackbits(packed, count=int(np.prod(state["shape"])))
            self.overlap.mask = torch.from_numpy(bits.astype(bool)).view(*state["shape"])


def _sources(config: Config, run_inputs: RunInputs) -> list[ScoredDataset]:
    data = config.data
    return [
        ScoredDataset(
            corpus,
            sequence_length=data.sequence_length,
            seed=config.run.seed,
            corpus_id=number,
            index_cache=index_cache(config),
            with_offsets=True,
            isolate_documents=data.document_policy == "isolated",
        )
        for number, corpus in enumerate(run_inputs.corpora[: data.micro_batch_size])
    ]


def _null_for_nan(value: float) -> float | None:
    return None if value != value else value
