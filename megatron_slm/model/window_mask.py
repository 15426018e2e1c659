"""The mask of sliding-window attention, for blocks of at most a window of queries."""

import torch
from torch import Tensor


class WindowMask:
    """Masks of blocks of queries, all cut from one tensor that the layers of a model share.

    A block of at most W queries sees at most 2W - 1 keys: those of the block and the W - 1 before
    it. Query i of the block sees keys i to i + W - 1 of these, whatever the block's place. torch's
    attention keeps the mask that it is given for backward: one tensor of W * (2W - 1) values for
    all blocks of all layers in the place of one for each.
    """

    def __init__(self, window_tokens: int):
        self.window_tokens = window_tokens
        self._band: Tensor | None = None

    def blocks(self, queries: int) -> list[slice]:
        """The blocks that `queries` consecutive queries are taken in."""
        starts = range(0, queries, self.window_tokens)
        return [slice(start, min(start + self.window_tokens, queries)) for start in starts]

    def keys(self, first_query: int, rows: int) -> slice:
        """The keys that any of `rows` queries from place first_query of the sequence on sees."""
        return slice(max(0, first_query - self.window_tokens + 1), first_query + rows)

    def added(self, first_query: int, rows: int, like: Tensor) -> Tensor:
        """What is added to the scores of these queries and keys(first_query, rows): 0 or -inf.

        [rows, keys], of the dtype and device of `like`.
        """
        window = self.window_tokens
        before_sequence = max(0, window - 1 - first_query)
        return self._whole(like)[:rows, before_sequence : rows + window - 1]

    def _whole(self, like: Tensor) -> Tensor:
        band = self._band
        if band is None or band.dtype != like.dtype or band.device != like.device:
            window = self.window_tokens
            with torch.inference_mode(False):  # it may be needed in training later
                seen = torch.ones(window, 2 * window - 1, dtype=torch.bool, device=like.device)
                seen = seen.triu().tril(window - 1)
                band = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
                band.masked_fill_(~seen, -torch.inf)
            self._band = band
        return band
