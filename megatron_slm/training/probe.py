"""A few fixed sequences looked at again and again: how much the choice moves between evaluations, and text to show a person.

B: the probe's sequences, S: their tokens on this context-parallel rank, T: whole sequences.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_slm.config.schema import Config
from megatron_slm.data.batch import collate, slice_for_context_parallel
from megatron_slm.data.scored_dataset import ScoredDataset
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.parallel import Groups
from megatron_slm.selection import Population, Progress
from megatron_slm.selection.diagnostics import ChoiceOverlap
from megatron_slm.selection.threshold import all_gather

VIEWED_SEQUENCES = 4


@dataclass(frozen=True)
class Seen:
    """What the model would choose from the probe now: whole sequences, the same on every rank of the last stage."""

    selected_BT: torch.Tensor
    loss_BT: torch.Tensor
    reference_loss_BT: torch.Tensor | None


class Probe:
    """The first micro-batch of the first corpus, the same on every data-parallel rank; chosen from by itself (scope micro_batch).

    Every rank of the model calls `look`. A plain run has nothing to look at.
    """

    def __init__(self, config: Config, materials, trainer):
        self.config, self.materials, self.trainer = config, materials, trainer
        self.overlap = ChoiceOverlap()
        self.usable = trainer.chooser.scorer.name != "none"
        if self.usable:
            data, groups = config.data, trainer.groups
            dataset = ScoredDataset(
                materials.corpora[0],
                sequence_length=data.sequence_length,
                seed=config.run.seed,
                index_cache=data.index_cache or Path(config.run.folder, "index_cache"),
                isolate_documents=data.document_policy == "isolated",
            )
            rows = list(range(data.micro_batch_size))
            self.whole = collate([dataset[i] for i in rows], rows)
            self.batch = slice_for_context_parallel(self.whole, groups.cp_rank, groups.cp_size).to(
                groups.device
            )

    def look(self, progress: Progress) -> Seen | None:
        """The choice on the probe and what it was made from; None off the last stage."""
        if not self.usable:
            return None
        trainer, chooser, batch = self.trainer, self.trainer.chooser, self.batch
        if trainer.reference is not None:
            for output in forward_losses(
                trainer.reference, [batch], trainer.groups, extras=trainer.reference_extras
            ):
                batch.columns.update({f"reference_{name}": value for name, value in output.items()})
        outputs = forward_losses(trainer.models, [batch], trainer.groups, extras=chooser.extras)
        if not outputs:
            return None
        population = Population("micro_batch", batch.token_id_BS, cp_group=trainer.groups.cp)
        selection = chooser.choose_from(population, batch, outputs[0], progress)
        order_BT = _side_by_side(batch.token_id_BS, trainer.groups).argsort(dim=1)

        def whole(value_BS):
            return _side_by_side(value_BS, trainer.groups).gather(1, order_BT)

        reference_BS = batch.columns.get("reference_loss")
        return Seen(
            whole(selection.mask.float()) > 0,
            whole(outputs[0]["loss"].float()),
            None if reference_BS is None else whole(reference_BS.float()),
        )

    def compare(self, progress: Progress) -> dict[str, float]:
        """selection/probe_overlap_fraction: tokens chosen now and at the last evaluation, over tokens chosen at either."""
        seen = self.look(progress)
        if seen is None:
            return {}
        both, either = next(iter(self.overlap.compare(seen.selected_BT).values()), (None, None))
        return (
            {}
            if both is None or not either
            else {"selection/probe_overlap_fraction": float(both / either)}
        )

    def view(self, progress: Progress) -> list[dict]:
        """Lines of token_view.jsonl: text, L_theta, L_ref and the choice of a few sequences."""
        seen = self.look(progress)
        if seen is None:
            return []
        batch, tokenizer = self.whole, self.materials.tokenizer
        reference_BT = seen.reference_loss_BT
        return [
            {
                "corpus": self.materials.corpora[0].prefix,
                "document": row,
                "tokens": [tokenizer.piece(int(token)) for token in batch.labels_BS[row]],
                "loss": seen.loss_BT[row].tolist(),
                "reference_loss": None
                if reference_BT is None
                else [None if value != value else value for value in reference_BT[row].tolist()],
                "selected": seen.selected_BT[row].tolist(),
            }
            for row in range(min(VIEWED_SEQUENCES, len(batch.tokens_BS)))
        ]

    def state_dict(self) -> dict:
        """The last choice, as hex of its bits."""
        mask = self.overlap.mask
        return (
            {}
            if mask is None
            else {"shape": list(mask.shape), "bits": np.packbits(mask.numpy()).tobytes().hex()}
        )

    def load_state_dict(self, state: dict) -> None:
        """Restore the last choice; another micro-batch size begins anew."""
        if self.usable and state and tuple(state["shape"]) == tuple(self.whole.tokens_BS.shape):
            bits = np.unpackbits(
                np.frombuffer(bytes.fromhex(state["bits"]), np.uint8),
                count=int(np.prod(state["shape"])),
            )
            self.overlap.mask = torch.from_numpy(bits.astype(bool)).view(*state["shape"])


def _side_by_side(value_BS: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The pieces of every sequence that the context-parallel ranks hold, in rank order."""
    return value_BS if groups.cp_size == 1 else torch.cat(all_gather(value_BS, groups.cp), dim=1)
