"""What a model of texts is asked, and how the next token is chosen.

Imports torch alone: the harness names these before it is known on which device the model will run.

V: the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A sequence of token ids, and how many of its last ones are asked about."""

    tokens: Sequence[int]
    asked: int


Answer = tuple[float, bool]
"""Sum of the log-probabilities of the asked tokens in nats; whether each was the most likely."""
Choose = Callable[[Tensor], int]
"""The next token from logits_V, fp32 on the CPU."""


def greedy(logits_V: Tensor) -> int:
    """The most likely token; of equal ones the first."""
    return int(logits_V.argmax())


def sampler(temperature: float, top_k: int, top_p: float) -> Choose:
    """Draws from softmax(logits / temperature), by torch's default generator.

    top_k: only the k most likely tokens; 0 = all. top_p: only the most likely tokens that together
    have at least this probability (nucleus sampling, arXiv 1904.09751); 1 = all.
    """

    def choose(logits_V: Tensor) -> int:
        ordered_V, token_V = (logits_V / temperature).sort(descending=True)
        if top_k:
            ordered_V[top_k:] = -torch.inf
        probability_V = ordered_V.softmax(-1)
        before_V = probability_V.cumsum(-1) - probability_V
        kept_V = torch.where(before_V < top_p, probability_V, 0.0)
        return int(token_V[torch.multinomial(kept_V, 1)])

    return choose
