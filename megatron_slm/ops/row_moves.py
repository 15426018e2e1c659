"""Finds, gathers and puts back the rows of a gradient: what a product on selected rows costs beside
the product.

One Triton pass each on a GPU (row_moves_triton.py), plain torch elsewhere. The number of rows found
must be known on the host, because it is the size of the products: one wait for the GPU.

Legend: N rows, K rows with a gradient, B blocks of columns, P columns of a part of a block, I input
features.
"""

import torch
from torch import Tensor

from megatron_slm.ops.layer_passes import runs_fused


class Rows:
    """Some of N rows, in their order."""

    def __init__(self, count: int, index_K: Tensor | None):
        self.count = count
        """N"""
        self.index_K = index_K
        """int64; None = all of them."""
        self._place_N: Tensor | None = None

    @classmethod
    def with_gradient(cls, grad_NBP: Tensor) -> "Rows":
        """The rows in which anything is not zero."""
        index_K = has_gradient(grad_NBP).nonzero().squeeze(1)
        every_row = len(index_K) == len(grad_NBP)
        return cls(len(grad_NBP), None if every_row else index_K)

    def of(self, rows_NBP: Tensor) -> Tensor:
        """[K, B P], contiguous where rows are left out, with rows_NBP of 2 or 3 dimensions."""
        if self.index_K is None:
            return rows_NBP.flatten(1)
        if runs_fused(rows_NBP):
            from megatron_slm.ops import row_moves_triton

            return row_moves_triton.take(rows_NBP, self.index_K)
        return rows_NBP[self.index_K].flatten(1)

    def spread(self, values_KI: Tensor, onto_NI: Tensor | None = None) -> Tensor:
        """[N, I]: the values in their rows and zero elsewhere, added to onto_NI, which is changed,
        where there is one.
        """
        if self.index_K is None:
            return values_KI if onto_NI is None else onto_NI.add_(values_KI)
        if runs_fused(values_KI):
            from megatron_slm.ops import row_moves_triton

            return row_moves_triton.spread(values_KI, self.places(), onto_NI)
        if onto_NI is None:
            onto_NI = values_KI.new_zeros(self.count, values_KI.shape[1])
        return onto_NI.index_add_(0, self.index_K, values_KI)

    def places(self) -> Tensor:
        """The place of each row in index_K, -1 where it is not."""
        if self._place_N is None:
            assert self.index_K is not None
            self._place_N = self.index_K.new_full((self.count,), -1)
            places_K = torch.arange(len(self.index_K), device=self.index_K.device)
            self._place_N.index_copy_(0, self.index_K, places_K)
        return self._place_N


def has_gradient(grad_NBP: Tensor) -> Tensor:
    """bool [N]: rows in which anything is not zero (NaN is not); 2 or 3 dimensions."""
    if runs_fused(grad_NBP):
        from megatron_slm.ops import row_moves_triton

        return row_moves_triton.has_gradient(grad_NBP)
    return grad_NBP.ne(0).flatten(1).any(1)
