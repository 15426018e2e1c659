"""megatron-core's GPTModel with the selective head.

B: sequences of one micro-batch, S: tokens of a sequence on this context-parallel rank, H: hidden
size. megatron-core's own tensors have the sequence first: SB, SBH.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_slm.ops import KnownRows, linear_cross_entropy, selected_linear_cross_entropy


class HeadOutput(NamedTuple):
    """What a model gives on the last pipeline stage when it is called with labels."""

    loss_BS: Tensor
    """fp32, nats; NaN in unselected rows if the head computed selected rows only."""
    loss_sum: Tensor | None
    """sum of weight * loss (0-d), where the head was given the weights; else None."""
    extras: dict[str, Tensor]
    """Other per-token values that were requested ("entropy"), fp32 [B, S]."""
    known_rows: KnownRows | None = None
    """Of a head over all rows: what its backward is told of the rows that have a gradient."""

    def loss_of(self, mask_BS: Tensor, tokens: int | None) -> Tensor:
        """loss_BS of the tokens in the mask, 0 elsewhere: backward computes their rows only.

        tokens: how many they are, where the host knows it. Else backward waits for the device.
        """
        if self.known_rows is not None and tokens is not None:
            self.known_rows.tell(mask_BS.transpose(0, 1), tokens)
        # where, not only times: a NaN outside the mask times 0 would still be NaN.
        return torch.where(mask_BS, self.loss_BS, 0.0)

    def per_token(self) -> dict[str, Tensor]:
        """ "loss" and the extras by name."""
        return {"loss": self.loss_BS, **self.extras}


class HeadChoice(NamedTuple):
    """A choice that is known before the head, which then computes these tokens only."""

    weight_BS: Tensor
    """fp32: what each token's loss is multiplied by; 0 = not chosen."""
    mask_BS: Tensor | None = None
    """bool: the chosen tokens; needed with `tokens` only."""
    tokens: int | None = None
    """How many they are, where the host knows it. Else forward waits for the device."""

    @property
    def known_rows(self) -> KnownRows:
        """The same in the order of the head's rows."""
        rows = KnownRows()
        if self.mask_BS is not None and self.tokens is not None:
            rows.tell(self.mask_BS.transpose(0, 1), self.tokens)
        return rows


def head_output(output: HeadOutput | Sequence | Tensor) -> HeadOutput:
    """The HeadOutput in a wrapped model's output.

    megatron-core's Float16Module turns it into a plain tuple, and GPTModel's own head returns the
    losses alone.
    """
    return HeadOutput(output, None, {}) if isinstance(output, Tensor) else HeadOutput(*output)


def head_weight(model: GPTModel) -> Tensor:
    """The weight of the head of a model with the last pipeline stage: [padded vocabulary, H]."""
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


def scale_embedding(embedding: nn.Module, scale: float) -> None:
    """Multiply what an embedding layer gives by `scale`, rounded to the dtype of what it gives."""
    embedding.register_forward_hook(partial(_scaled, scale))


def _scaled(scale: float, _: nn.Module, arguments: tuple, hidden_SBH: Tensor) -> Tensor:
    # transformers has the factor as a tensor of the weights' dtype. A tensor made here would have
    # to wait for its copy to a GPU; a number does not.
    return hidden_SBH * float(torch.tensor(scale, dtype=hidden_SBH.dtype))


class Decoder(GPTModel):
    """GPTModel whose labels-path is the selective head: per-token fp32 losses, no logits kept.

    `forward(tokens, position_ids, attention_mask, labels=labels_BS)` gives a HeadOutput on the last
    stage, with a per-token value for each name in `extra_outputs`. With a `head_choice` too the
    head computes the chosen tokens only and sums weight * loss. Without labels it gives logits, and
    on other stages a hidden state, as GPTModel does. With `asked_BS=mark_BS` in place of labels it
    gives the logits of one token of each sequence alone.
    """

    vocabulary_size: int
    extra_outputs: tuple[str, ...] = ()
    head_engine: Literal["torch", "liger"] = "torch"
    accumulates_head_gradient: bool = False
    """The gradient of the head's weight is added to its main_grad in the product that makes it."""

    def forward(
        self,
        *arguments: Any,
        head_choice: HeadChoice | None = None,
        asked_BS: Tensor | None = None,
        **named: Any,
    ):
        # GPTModel.forward hands loss_mask on to _postprocess and reads it for multi-token
        # prediction only, which we do not build. With labels it is head_choice, without asked_BS.
        loss_mask = head_choice if asked_BS is None else asked_BS
        return super().forward(*arguments, loss_mask=loss_mask, **named)

    def _postprocess(
        self, hidden_states, input_ids, position_ids, labels, *args, loss_mask=None, **kwargs
    ):
        if self.post_process and labels is None and loss_mask is not None:
            return self._asked_logits(hidden_states, loss_mask)
        if not self.post_process or labels is None:
            return super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        labels_SB = labels.transpose(0, 1).contiguous()
        if loss_mask is not None:
            return self._selected_rows(hidden_states, labels_SB, choice=loss_mask)
        return self._all_rows(hidden_states, labels_SB)

    def _asked_logits(self, hidden_SBH: Tensor, asked_BS: Tensor) -> Tensor:
        """logits_BV after the one token of each sequence that is marked with 1, this tensor rank's
        part of the vocabulary; zeros where no token of the sequence is marked.
        """
        if self.config.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, group=self.pg_collection.tp
            )
        sequences = torch.arange(len(asked_BS), device=asked_BS.device)
        hidden_BH = hidden_SBH[asked_BS.argmax(dim=1), sequences]
        logits_BV = hidden_BH @ head_weight(self).t()
        return torch.where(asked_BS.amax(dim=1, keepdim=True) > 0, logits_BV, 0.0)

    def _all_rows(self, hidden_SBH: Tensor, labels_SB: Tensor) -> HeadOutput:
        known_rows = KnownRows()
        result = linear_cross_entropy(
            hidden_SBH,
            head_weight(self),
            labels_SB,
            extras=self.extra_outputs,
            engine=self.head_engine,
            known_rows=known_rows,
            **self._head_settings(),
        )
        loss_SB, extras_SB = result if isinstance(result, tuple) else (result, {})
        extras = {name: _batch_first(extras_SB[name].float()) for name in self.extra_outputs}
        return HeadOutput(_batch_first(loss_SB), None, extras, known_rows)

    def _selected_rows(
        self, hidden_SBH: Tensor, labels_SB: Tensor, choice: HeadChoice
    ) -> HeadOutput:
        # This head computes its gradients in forward and stores them in the model's precision, so
        # under fp16 the loss scale must already be applied here.
        scale = 1.0
        if self.config.grad_scale_func is not None:
            scale = self.config.grad_scale_func(choice.weight_BS.new_ones(()))
        loss_sum, loss_SB = selected_linear_cross_entropy(
            hidden_SBH,
            head_weight(self),
            labels_SB,
            choice.weight_BS.transpose(0, 1) * scale,
            known_rows=choice.known_rows,
            **self._head_settings(),
        )
        return HeadOutput(_batch_first(loss_SB), (loss_sum / scale).squeeze(), {})

    def _head_settings(self) -> dict[str, Any]:
        tp_group = self.pg_collection.tp
        return {
            "vocabulary_size": self.vocabulary_size,
            "tp_group": tp_group if tp_group.size() > 1 else None,
            "sequence_parallel": self.config.sequence_parallel,
            "accumulate_into_main_grad": self.accumulates_head_gradient,
        }


def _batch_first(value_SB: Tensor) -> Tensor:
    return value_SB.transpose(0, 1).contiguous()
