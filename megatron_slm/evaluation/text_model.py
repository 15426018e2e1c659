"""A checkpoint that answers questions about token sequences of any length, on any number of
processes: how likely is a continuation, and what comes next?

B: sequences of a micro-batch, S: their padded length, V: the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_slm.config.sizes import sequence_pieces
from megatron_slm.data.batch import Batch, plain_batch
from megatron_slm.evaluation.text_requests import Answer, Choose, Row
from megatron_slm.model.context_parallel import on_this_rank, whole_sequences
from megatron_slm.model.forward_backward import forward_logits, forward_losses
from megatron_slm.parallel import Groups
from megatron_slm.scoring.in_step import InStep

MICRO_BATCHES_PER_STAGE = 4


@dataclass(frozen=True)
class TextModel:
    """This rank's chunks of a frozen model. Every rank of a model-parallel group calls its methods
    with the same arguments, and gets the same answers; data-parallel ranks are independent, unless
    experts are spread over them: then each calls `finish` when it has nothing left to ask.
    """

    models: Sequence[Module]
    groups: Groups
    vocabulary_size: int
    batch_size: int
    """Sequences per forward pass."""

    def log_probabilities(
        self, rows: Sequence[Row], done: Callable[[int], object] = lambda rows: None
    ) -> list[Answer]:
        """An answer per row, each of at least two tokens. Equals, for a row alone,
        `-cross_entropy(logits, labels, reduction="none")[-asked:].sum()` on fp32 logits.

        Rows of similar length are read together, the longest first. done: called with the number of
        rows that were answered.
        """
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
        answers: list[Answer] = [(0.0, True)] * len(rows)
        per_call = self.batch_size
        if self.groups.pp_size > 1:
            per_call *= MICRO_BATCHES_PER_STAGE * self.groups.pp_size
        for first in range(0, len(order), per_call):
            members = order[first : first + per_call]
            called = [rows[index] for index in members]
            for index, answer in zip(members, self._answers(called), strict=True):
                answers[index] = answer
            done(len(members))
        return answers

    @property
    def asks_together(self) -> bool:
        """Whether data-parallel ranks need each other's experts, and so `finish`."""
        return InStep(self.groups).is_needed

    def finish(self) -> None:
        """Run what other data-parallel ranks need of this one's experts, until none needs any."""
        idle_BS = np.zeros((1, self._padded(1)), np.int64)
        InStep(self.groups).finish(plain_batch(idle_BS, idle_BS), self._losses_and_ranks)

    def _answers(self, rows: Sequence[Row]) -> list[Answer]:
        length = self._padded(max(len(row.tokens) for row in rows) - 1)
        starts = range(0, len(rows), self.batch_size)
        batches = [self._batch(rows[first : first + self.batch_size], length) for first in starts]
        outputs = InStep(self.groups).run(batches, self._losses_and_ranks)
        shape = (2, len(batches) * self.batch_size, length)
        both = self._from_last_stage(torch.cat(outputs, dim=1) if outputs else None, shape)
        loss_NS, rank_NS = both.double().cpu()
        return [
            _answer(loss_NS[number], rank_NS[number], len(row.tokens) - 1, row.asked)
            for number, row in enumerate(rows)
        ]

    def _losses_and_ranks(self, batches: Sequence[Batch]) -> list[Tensor]:
        """fp32 [2, B, S] of each batch, on the last pipeline stage: losses, and how many tokens
        were more likely than the label.
        """
        outputs = forward_losses(
            self.models,
            on_this_rank(batches, self.groups),
            self.groups,
            extras=("target_rank",),
        )
        return [self._whole(output["loss"], output["target_rank"]) for output in outputs]

    def _whole(self, *values_BS: Tensor) -> Tensor:
        """[number of values, B, whole S], fp32: the parts of all context-parallel ranks."""
        return torch.stack([whole_sequences(value.float(), self.groups) for value in values_BS])

    def _from_last_stage(self, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """The last pipeline stage's fp32 value of this shape, on every stage."""
        if value is None:
            value = torch.zeros(shape, device=self.groups.device)
        if self.groups.pp_size > 1:
            value = value.contiguous()
            dist.broadcast(value, group=self.groups.pp, group_src=self.groups.pp_size - 1)
        return value

    def _batch(self, rows: Sequence[Row], length: int) -> Batch:
        """Rows of tokens and the tokens after them, padded with 0 on the right: attention is
        causal, so that no token sees the padding.
        """
        tokens_BS = np.zeros((self.batch_size, length), np.int64)
        labels_BS = np.zeros_like(tokens_BS)
        for number, row in enumerate(rows):
            inputs = len(row.tokens) - 1
            tokens_BS[number, :inputs] = row.tokens[:-1]
            labels_BS[number, :inputs] = row.tokens[1:]
        return plain_batch(tokens_BS, labels_BS)

    def _padded(self, length: int) -> int:
        divisor = sequence_pieces(self.groups.tp_size, self.groups.cp_size)
        return -(-length // divisor) * divisor

    @torch.no_grad()
    def continued(
        self,
        prompts: Sequence[Sequence[int]],
        maximum_tokens: int,
        choose: Choose,
        is_finished: Callable[[Sequence[int]], bool],
    ) -> list[list[int]]:
        """The tokens that follow each prompt, at most `maximum_tokens`.

        One forward pass of the whole text per token: nothing is kept between them, so the cost
        grows with the square of the length. is_finished: of the new tokens; they end with the one
        for which it is true.
        """
        texts = [list(prompt) for prompt in prompts]
        for first in range(0, len(texts), self.batch_size):
            growing = texts[first : first + self.batch_size]
            starts = [len(text) for text in growing]
            unfinished = list(range(len(growing)))
            for _ in range(maximum_tokens):
                logits_BV = self._next_logits([growing[number] for number in unfinished])
                chosen = self._agreed([choose(logits_V) for logits_V in logits_BV])
                for number, token in zip(unfinished, chosen, strict=True):
                    growing[number].append(token)
                unfinished = [
                    number
                    for number in unfinished
                    if not is_finished(growing[number][starts[number] :])
                ]
                if not unfinished:
                    break
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """fp32 on the CPU: the logits of the token after each text."""
        tokens_BS = np.zeros((len(texts), self._padded(max(map(len, texts)))), np.int64)
        for number, text in enumerate(texts):
            tokens_BS[number, : len(text)] = text
        last_B = torch.tensor([len(text) - 1 for text in texts])
        batch = plain_batch(tokens_BS, tokens_BS)
        asked_BS = (batch.position_ids_BS == last_B[:, None]).float()
        outputs = InStep(self.groups).run([replace(batch, loss_mask_BS=asked_BS)], self._logits)
        shape = (len(texts), self.vocabulary_size)
        return self._from_last_stage(outputs[0] if outputs else None, shape).cpu()

    def _logits(self, batches: Sequence[Batch]) -> list[Tensor]:
        return forward_logits(self.models, on_this_rank(batches, self.groups), self.groups)

    def _agreed(self, tokens: list[int]) -> list[int]:
        """The choices of the first rank, on all ranks of the model-parallel group: they draw from
        equal logits, but pipeline stages with seeds of their own.
        """
        box = torch.tensor(tokens, device=self.groups.device)
        for group in (self.groups.tp, self.groups.cp, self.groups.pp):
            if group.size() > 1:
                dist.broadcast(box, group=group, group_src=0)
        return box.tolist()


def _answer(loss_S: Tensor, rank_S: Tensor, inputs: int, asked: int) -> Answer:
    last = slice(inputs - asked, inputs)
    return -float(loss_S[last].sum()), bool((rank_S[last] == 0).all())
