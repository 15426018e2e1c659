"""A few fixed sequences looked at again and again: how much the choice moves between evaluations,
and text to show a person.

B: the probe's sequences, S: their tokens on this context-parallel rank, T: whole sequences.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from megatron_slm.config.schema import Config
from megatron_slm.data.batch import collate, slice_for_context_parallel
from megatron_slm.data.scored_dataset import ScoredDataset
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.parallel import Groups
from megatron_slm.selection import Population, TrainingProgress
from megatron_slm.selection.diagnostics import ChoiceOverlap
from megatron_slm.selection.threshold import all_gather

VIEWED_SEQUENCES = 4


@dataclass(frozen=True)
class ProbeResult:
    """What the model would choose from the probe now: whole sequences, the same on every rank of
    the last stage.
    """

    selected_BT: torch.Tensor
    loss_BT: torch.Tensor
    reference_loss_BT: torch.Tensor | None


class Probe:
    """One micro-batch, dealt over the corpora in turn, the same on every data-parallel rank; chosen
    from by itself (scope micro_batch).

    Of the n first corpora, where n is their number or the micro-batch's sequences, whichever is
    smaller, it holds the first samples in training order. Every rank of the model calls `evaluate`. A
    plain run has nothing to look at.
    """

    def __init__(self, config: Config, run_inputs, trainer):
        self.config, self.run_inputs, self.trainer = config, run_inputs, trainer
        self.overlap = ChoiceOverlap()
        self.usable = trainer.selector.scorer.name != "none"
        if self.usable:
            data, groups = config.data, trainer.groups
            self.sources = [
                ScoredDataset(
                    corpus,
                    sequence_length=data.sequence_length,
                    seed=config.run.seed,
                    corpus_id=number,
                    index_cache=data.index_cache or Path(config.run.folder, "index_cache"),
                    with_offsets=True,
                    isolate_documents=data.document_policy == "isolated",
                )
                for number, corpus in enumerate(run_inputs.corpora[: data.micro_batch_size])
            ]
            rows, dealt = list(range(data.micro_batch_size)), len(self.sources)
            self.whole = collate([self.sources[row % dealt][row // dealt] for row in rows], rows)
            self.text = sha256(self.whole.labels_BS.numpy().tobytes()).hexdigest()
            self.batch = slice_for_context_parallel(self.whole, groups.cp_rank, groups.cp_size).to(
                groups.device
            )

    def evaluate(self, progress: TrainingProgress) -> ProbeResult | None:
        """The choice on the probe and what it was made from; None off the last stage."""
        if not self.usable:
            return None
        trainer, selector, batch = self.trainer, self.trainer.selector, self.batch
        if trainer.reference is not None:
            for output in forward_losses(
                trainer.reference, [batch], trainer.groups, extras=trainer.reference_extras
            ):
                batch.columns.update({f"reference_{name}": value for name, value in output.items()})
        outputs = forward_losses(trainer.models, [batch], trainer.groups, extras=selector.extras)
        if not outputs:
            return None
        population = Population("micro_batch", batch.token_id_BS, cp_group=trainer.groups.cp)
        selection = selector.choose_from(population, batch, outputs[0], progress)
        order_BT = _side_by_side(batch.token_id_BS, trainer.groups).argsort(dim=1)

        def whole(value_BS):
            return _side_by_side(value_BS, trainer.groups).gather(1, order_BT)

        reference_BS = batch.columns.get("reference_loss")
        return ProbeResult(
            whole(selection.mask.float()) > 0,
            whole(outputs[0]["loss"].float()),
            None if reference_BS is None else whole(reference_BS.float()),
        )

    def compare(self, progress: TrainingProgress) -> dict[str, float]:
        """selection/probe_overlap_fraction: tokens chosen now and at the last evaluation, over
        tokens chosen at either.
        """
        result = self.evaluate(progress)
        if result is None:
            return {}
        both, either = next(iter(self.overlap.compare(result.selected_BT).values()), (None, None))
        return (
            {}
            if both is None or not either
            else {"selection/probe_overlap_fraction": float(both / either)}
        )

    def view(self, progress: TrainingProgress) -> list[dict]:
        """Lines of token_view.jsonl: text, L_theta, L_ref and the choice of a few sequences."""
        result = self.evaluate(progress)
        if result is None:
            return []
        tokenizer, reference_BT = self.run_inputs.tokenizer, result.reference_loss_BT
        return [
            {
                **self._origin(row),
                "tokens": [tokenizer.piece(int(token)) for token in self.whole.labels_BS[row]],
                "loss": result.loss_BT[row].tolist(),
                "reference_loss": None
                if reference_BT is None
                else [None if value != value else value for value in reference_BT[row].tolist()],
                "selected": result.selected_BT[row].tolist(),
            }
            for row in range(min(VIEWED_SEQUENCES, len(self.whole.tokens_BS)))
        ]

    def _origin(self, row: int) -> dict:
        """Where the labels of a sequence stand: their corpus, the offset of the first, and
        [document, place of its first label here].
        """
        number = int(self.whole.corpus_id_B[row])
        index, offset_T = self.sources[number].corpus_index, self.whole.offsets_BS[row].tolist()
        # The first token of a document is no target; a window is never padded, so nothing else is
        # masked in it.
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
        """Restore the last choice; where the probe now holds other tokens, comparing begins anew."""
        if self.usable and state and state.get("text") == self.text:
            bits = np.unpackbits(
                np.frombuffer(bytes.fromhex(state["bits"]), np.uint8),
                count=int(np.prod(state["shape"])),
            )
            self.overlap.mask = torch.from_numpy(bits.astype(bool)).view(*state["shape"])


def _side_by_side(value_BS: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The pieces of every sequence that the context-parallel ranks hold, in rank order."""
    return value_BS if groups.cp_size == 1 else torch.cat(all_gather(value_BS, groups.cp), dim=1)
