"""The rows that a call of the head computes gradients for, where the host knows their number.

That number is the size of the products. To ask the device for it is to wait for all queued work;
who chose the rows has often read it already, with the other facts of the choice.

Legend: N tokens, K rows to compute.
"""

import torch
from torch import Tensor


class KnownRows:
    """Of one call; told by its caller before the call or, where the choice needs the losses of the
    call, before its backward.
    """

    def __init__(self) -> None:
        self._mask_N: Tensor | None = None
        self._count = 0

    def tell(self, mask: Tensor, count: int) -> None:
        """Rows in the mask are to be computed, and no others; there are `count` of them.

        mask is bool, of the shape of the call's target, and the same on every tensor rank.
        """
        self._mask_N = mask.reshape(-1)
        self._count = count

    def index(self, value_N: Tensor) -> Tensor:
        """The rows to compute, int64 [K] in ascending order: value_N.nonzero(), which waits for the
        device. Where the rows were told it is the whole mask, without a wait.

        To compute other rows would give another gradient, so a value outside the mask, or a count
        that is not the mask's, is an error: RuntimeError on a CPU; on a GPU, where nothing may
        wait for the answer, an assertion of the device, which ends the process.
        """
        if self._mask_N is None:
            return value_N.nonzero().squeeze(1)
        counted = self._mask_N.sum() == self._count
        outside_N = value_N.ne(0) & ~self._mask_N
        torch._assert_async(
            counted & ~outside_N.any(),
            f"the head was told of {self._count} rows to compute, but its mask has another number "
            "of them, or leaves out a row that has a gradient or a weight",
        )
        return torch.nonzero_static(self._mask_N, size=self._count).squeeze(1)
