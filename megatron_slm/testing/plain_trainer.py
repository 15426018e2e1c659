"""Selective language modeling in plain single-process torch, without megatron-core.

It is written to be read beside the paper, not to be fast.

G sequences of the global batch, S tokens.
"""

import math

import torch
from torch import Tensor

from megatron_slm.config.schema import OptimizerConfig
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.selection_oracle import top_tokens


class PlainTrainer:
    """AdamW on the mean loss of the selected tokens."""

    def __init__(self, decoder: PlainDecoder, optimizer_settings: OptimizerConfig):
        self.decoder = decoder
        self.settings = optimizer_settings
        decayed = [p for p in decoder.parameters() if p.dim() > 1]
        others = [p for p in decoder.parameters() if p.dim() <= 1]
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": optimizer_settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=optimizer_settings.learning_rate,
            betas=(optimizer_settings.beta1, optimizer_settings.beta2),
            eps=optimizer_settings.epsilon,
        )

    def step(
        self,
        batch: dict[str, Tensor],
        populations: list[list[int]],
        keep_fraction: float | None,
        learning_rate: float,
        micro_batches: list[list[int]] | None = None,
    ) -> tuple[set[int], float, float, float]:
        """One update; keep_fraction None = plain CLM.

        populations     rows of the global batch whose tokens compete with each other
        micro_batches   rows over which experts are balanced; a mixture of experts needs them

        Returns (ids of selected tokens, mean loss of all eligible tokens, mean loss of selected
        tokens, gradient norm before clipping).
        """
        loss_GS = self.decoder.loss(batch["tokens"], batch["labels"], batch.get("document_start"))
        eligible_GS = batch["loss_mask"] > 0
        ids_GS = torch.arange(loss_GS.numel()).view(loss_GS.shape)
        selected: set[int] = set()
        for rows in populations:
            if keep_fraction is None:
                selected |= set(ids_GS[rows][eligible_GS[rows]].tolist())
            else:
                excess = loss_GS[rows].detach() - batch["reference_loss"][rows]
                selected |= top_tokens(
                    excess.flatten().tolist(),
                    ids_GS[rows].flatten().tolist(),
                    eligible_GS[rows].flatten().tolist(),
                    keep_fraction,
                )
        mask_GS = torch.isin(ids_GS, torch.tensor(sorted(selected)))
        objective, norm = self.update(loss_GS, mask_GS.float(), learning_rate, micro_batches)
        return selected, float(loss_GS[eligible_GS].mean()), objective, norm

    def update(
        self,
        loss_GS: Tensor,
        weight_GS: Tensor,
        learning_rate: float,
        micro_batches: list[list[int]] | None = None,
    ) -> tuple[float, float]:
        """One update on the weighted mean loss and the auxiliary losses of experts.

        Returns (the weighted mean loss, gradient norm before clipping).
        """
        objective = (loss_GS * weight_GS).sum() / weight_GS.sum()
        self.adam.zero_grad()
        whole = objective
        model = self.decoder.model
        if model.experts:
            assert micro_batches is not None, "experts are balanced over micro-batches"
            self.balance, self.z_loss = self.decoder.auxiliary_losses(micro_batches)
            whole = (
                whole
                + model.load_balancing_coefficient * self.balance
                + model.router_z_loss_coefficient * self.z_loss
            )
        whole.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.decoder.parameters(), self.settings.clip_grad_norm or math.inf
        )
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        return float(objective), float(norm)
