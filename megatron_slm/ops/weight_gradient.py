"""The gradient of the head's weight: summed in fp32, then given to autograd or to main_grad.

megatron-core's gradient-accumulation fusion keeps an fp32 buffer, `main_grad`, on the parameter
object. A layer that adds to it sets `grad_added_to_main_grad`, where there is one, and returns a
placeholder to autograd: LinearWithGradAccumulationAndAsyncCommunication.backward in
megatron.core.tensor_parallel.layers. The same protocol is followed here.

Legend: K rows with a gradient, C rows of a chunk, H hidden, V this rank's true vocabulary columns;
the weight may have more rows than V (padding), which get no gradient.
"""

import torch
from torch import Tensor

from megatron_slm.ops.matmul import accumulate_weight_gradient


class ParameterWithMainGrad(torch.nn.Parameter):
    """For type checkers: a parameter with the attributes that megatron-core sets on it."""

    main_grad: Tensor
    grad_added_to_main_grad: bool
    """Absent where nothing asks for it."""


class WeightGradient:
    """The fp32 sum of the products of all chunks.

    It is formed in the parameter's main_grad where that is fp32, and else in a buffer of its own.
    """

    def __init__(self, weight: Tensor, columns: int, parameter: ParameterWithMainGrad | None):
        """`columns` rows of the weight are true. `parameter` None = always a buffer of its own."""
        self.columns = columns
        if parameter is not None and parameter.main_grad.dtype == torch.float32:
            self.total_VH = parameter.main_grad
            self._unwritten = False
        else:
            self.total_VH = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            self._unwritten = True

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        """total += gradient.T @ hidden."""
        true_VH = self.total_VH[: self.columns]
        accumulate_weight_gradient(true_VH, gradient_CV, hidden_CH, fresh=self._unwritten)
        self._padding_is_written()

    def add_product(self, product_VH: Tensor) -> None:
        """total += product."""
        if self._unwritten:
            self.total_VH[: self.columns] = product_VH
        else:
            self.total_VH[: self.columns].add_(product_VH)
        self._padding_is_written()

    def total(self) -> Tensor:
        """The sum over all rows of the weight; zero where nothing was added."""
        if self._unwritten:
            self.total_VH.zero_()
            self._unwritten = False
        return self.total_VH

    def _padding_is_written(self) -> None:
        if self._unwritten:
            self.total_VH[self.columns :].zero_()
            self._unwritten = False


def deliver_weight_gradient(
    gradient_VH: Tensor, parameter: ParameterWithMainGrad | None, dtype: torch.dtype
) -> Tensor | None:
    """The gradient for autograd; with `parameter`, a placeholder, and the gradient goes into
    main_grad.
    """
    if parameter is None:
        return gradient_VH.to(dtype)
    if gradient_VH is not parameter.main_grad:
        parameter.main_grad.add_(gradient_VH)
    return placeholder_gradient(parameter)


def placeholder_gradient(parameter: ParameterWithMainGrad) -> Tensor | None:
    """The placeholder for autograd once main_grad holds the gradient; also sets the flag."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    if getattr(parameter, "zero_out_wgrad", False):
        # A tied embedding adds its own gradient to this placeholder, and megatron-core then adds
        # the sum to main_grad: the placeholder must be zeros.
        return torch.zeros_like(parameter)
    return torch.empty_like(parameter)
