"""A few fixed sequences looked at again and again: how much the choice moves between evaluations, and text to show a person."""

from pathlib import Path

import numpy as np
import torch

from megatron_slm.config.schema import Config
from megatron_slm.data.batch import collate
from megatron_slm.data.scored_dataset import ScoredDataset
from megatron_slm.model.forward_backward import forward_losses
from megatron_slm.selection import Population, Progress, Selection
from megatron_slm.selection.diagnostics import ChoiceOverlap

VIEWED_SEQUENCES = 4


class Probe:
    """The first micro-batch of the first corpus, the same on every data-parallel rank; chosen from by itself (scope micro_batch).

    Not used with context parallelism, where no rank holds a whole sequence. Every rank of the model calls `look`.
    """

    def __init__(self, config: Config, materials, trainer):
        self.config, self.materials, self.trainer = config, materials, trainer
        self.overlap = ChoiceOverlap()
        self.usable = trainer.groups.cp_size == 1 and trainer.chooser.scorer.name != "none"
        if self.usable:
            data = config.data
            dataset = ScoredDataset(materials.corpora[0], sequence_length=data.sequence_length, seed=config.run.seed,
                                    index_cache=data.index_cache or Path(config.run.folder, "index_cache"),
                                    isolate_documents=data.document_policy == "isolated")
            rows = list(range(data.micro_batch_size))
            self.batch = collate([dataset[i] for i in rows], rows).to(trainer.groups.device)

    def look(self, progress: Progress) -> tuple[Selection, dict] | None:
        """(what the model would choose from the probe now, its per-token values); None off the last stage."""
        if not self.usable:
            return None
        trainer, chooser = self.trainer, self.trainer.chooser
        if trainer.reference is not None:
            for output in forward_losses(trainer.reference, [self.batch], trainer.groups, extras=trainer.reference_extras):
                self.batch.columns.update({f"reference_{name}": value for name, value in output.items()})
        outputs = forward_losses(trainer.models, [self.batch], trainer.groups, extras=chooser.extras)
        if not outputs:
            return None
        population = Population("micro_batch", self.batch.token_id_BS)
        return chooser.choose_from(population, self.batch, outputs[0], progress), outputs[0]

    def compare(self, progress: Progress) -> dict[str, float]:
        """selection/probe_overlap_fraction: tokens chosen now and at the last evaluation, over tokens chosen at either."""
        seen = self.look(progress)
        if seen is None:
            return {}
        both, either = next(iter(self.overlap.compare(seen[0].mask).values()), (None, None))
        return {} if both is None or not either else {"selection/probe_overlap_fraction": float(both / either)}

    def view(self, progress: Progress) -> list[dict]:
        """Lines of token_view.jsonl: text, L_theta, L_ref and the choice of a few sequences."""
        seen = self.look(progress)
        if seen is None:
            return []
        selection, output = seen
        batch, tokenizer = self.batch, self.materials.tokenizer
        reference_BS = batch.columns.get("reference_loss")
        return [{"corpus": self.materials.corpora[0].prefix, "document": row,
                 "tokens": [tokenizer.piece(int(token)) for token in batch.labels_BS[row]], "loss": output["loss"][row].tolist(),
                 "reference_loss": None if reference_BS is None else [None if value != value else value for value in reference_BS[row].tolist()],
                 "selected": selection.mask[row].tolist()} for row in range(min(VIEWED_SEQUENCES, len(batch.tokens_BS)))]

    def state_dict(self) -> dict:
        """The last choice, as hex of its bits."""
        mask = self.overlap.mask
        return {} if mask is None else {"shape": list(mask.shape), "bits": np.packbits(mask.numpy()).tobytes().hex()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the last choice; another micro-batch size begins anew."""
        if self.usable and state and tuple(state["shape"]) == tuple(self.batch.tokens_BS.shape):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(state["bits"]), np.uint8), count=int(np.prod(state["shape"])))
            self.overlap.mask = torch.from_numpy(bits.astype(bool)).view(*state["shape"])
