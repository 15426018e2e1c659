"""Which windows of tokens score which tokens. Pure numpy.

A window reads up to W consecutive tokens and predicts the token after each. A span is the whole
corpus when documents are packed, one document when they are isolated. Window 0 scores the first W
tokens of its span, except the very first, which nothing precedes. Each later window scores the next
`stride` tokens; its inputs end just before the last of them. So

- every token but the first of its span is scored exactly once,
- with at least W - stride + 1 tokens of left context, or all that precede it in its span,
- and the windows of a token depend on (W, stride, policy) alone, not on shards, batches or
  processes.

With stride = W windows do not overlap, and the cost is one forward pass per token; stride = W/2
costs twice that and gives every token at least half a window of context.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Window:
    """Reads the tokens [first, last) and scores the tokens [score_start, score_end), which all lie
    in (first, last].
    """

    first: int
    last: int
    score_start: int
    score_end: int

    @property
    def inputs(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class WindowPlan:
    """How a corpus is cut into windows; document_starts are the offsets of the first tokens of all
    documents that are not empty.
    """

    tokens: int
    document_starts: np.ndarray
    window_tokens: int
    stride_tokens: int
    document_policy: str

    def windows(self, start: int, end: int) -> Iterator[Window]:
        """The windows that score the tokens [start, end), in order. A window on the edge scores
        only those of its tokens that lie inside.
        """
        for span_start, span_end in self._spans(start, end):
            yield from self._span_windows(
                span_start, span_end, max(start, span_start), min(end, span_end)
            )

    def first_tokens(self, start: int, end: int) -> np.ndarray:
        """Offsets in [start, end) of tokens without a meaningful score: the first of each document.

        docs/method.md#point-14
        """
        low, high = np.searchsorted(self.document_starts, (start, end))
        return self.document_starts[low:high]

    def _spans(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if self.document_policy == "packed":
            yield 0, self.tokens
            return
        low = max(0, int(np.searchsorted(self.document_starts, start, side="right")) - 1)
        high = int(np.searchsorted(self.document_starts, end))
        bounds = np.append(self.document_starts[low : high + 1], self.tokens)
        yield from pairwise(bounds[: high - low + 1].tolist())

    def _span_windows(
        self, span_start: int, span_end: int, start: int, end: int
    ) -> Iterator[Window]:
        width = self.window_tokens
        stride = self.stride_tokens
        # A block is the tokens that one window scores; the first one here reaches `start`.
        block = max(0, -(-(start + 1 - span_start - width) // stride))
        while True:
            block_start = span_start + (width + (block - 1) * stride if block else 1)
            block_end = min(span_start + width + block * stride, span_end)
            if block_start >= end:
                return
            score_start = max(block_start, start)
            score_end = min(block_end, end)
            if score_start < score_end:
                yield Window(
                    max(span_start, block_end - 1 - width), block_end - 1, score_start, score_end
                )
            block += 1


def batches(
    windows: list[Window], micro_batch_size: int, lengths: list[int]
) -> Iterator[tuple[int, list[Window]]]:
    """Groups of up to micro_batch_size windows, with the input length that they are padded to: the
    smallest of `lengths` that fits.

    They depend on the windows alone, so a shard that is scored again is scored in the same batches
    and gives the same bits.
    """
    lengths = sorted(lengths)
    by_length: dict[int, list[Window]] = {length: [] for length in lengths}
    for window in windows:
        by_length[next(length for length in lengths if length >= window.inputs)].append(window)
    for length in lengths:
        members = by_length[length]
        for position in range(0, len(members), micro_batch_size):
            yield length, members[position : position + micro_batch_size]


def padded_lengths(window_tokens: int, document_policy: str, divisor: int) -> list[int]:
    """Input lengths that a batch may have: the window, and for isolated documents its half, quarter
    and so on, down to about 64 tokens.

    divisor: what the parallel layout needs a sequence to be a multiple of.
    """
    lengths = [window_tokens]
    while document_policy == "isolated" and lengths[-1] > 64 and lengths[-1] % (2 * divisor) == 0:
        lengths.append(lengths[-1] // 2)
    return lengths
