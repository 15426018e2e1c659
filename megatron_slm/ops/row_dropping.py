"""Backward that drops the gradient of unselected tokens below the layers they pass: APPROXIMATE.

Below the last layer every token receives some gradient through keys and values.
`drop_unselected_rows(layers)` drops that gradient at each layer's input, as Collider (arXiv
2502.00340) does, so that the rows of unselected tokens stay zero in all layers below, and
row_skipping.py can leave them out. This works across pipeline stages too: zero rows are recognised
in the gradient itself, so nothing else is communicated.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from megatron_slm.ops.row_moves import has_gradient


class _RowsWithGradient:
    """Which rows of one layer's output carried a gradient in the backward now running."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None


class _RowsContext(FunctionCtx):
    with_gradient: _RowsWithGradient


class _RecordRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RowsContext, output: Tensor, with_gradient: _RowsWithGradient) -> Tensor:
        ctx.with_gradient = with_gradient
        return output.view_as(output)

    @staticmethod
    def backward(ctx: _RowsContext, grad: Tensor) -> tuple[Tensor, None]:
        rows_N = has_gradient(grad.flatten(0, -2))
        ctx.with_gradient.rows = rows_N.view(*grad.shape[:-1], 1)
        return grad, None


class _DropRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RowsContext, input: Tensor, with_gradient: _RowsWithGradient) -> Tensor:
        ctx.with_gradient = with_gradient
        return input.view_as(input)

    @staticmethod
    def backward(ctx: _RowsContext, grad: Tensor) -> tuple[Tensor, None]:
        rows, ctx.with_gradient.rows = ctx.with_gradient.rows, None
        assert rows is not None, "backward passes a layer's output before its input"
        return torch.where(rows, grad, 0.0), None


def drop_unselected_rows(layers: Iterable[nn.Module]) -> list[torch.utils.hooks.RemovableHandle]:
    """Tokens without a gradient at a layer's output get none at its input.

    APPROXIMATE: gradients of parameters below change. `layers` are called with the hidden states
    first (or as hidden_states=...) and return them, alone or first of a tuple. What is lost is the
    gradient that selected tokens send to earlier unselected tokens through keys and values, below
    that layer; within the layer keys and values keep theirs. Remove the returned handles to have
    exact gradients again. Not with activation recompute of whole layers: the second forward would
    run inside backward.
    """
    handles = []
    for layer in layers:
        # One queue per layer: with several micro-batches in flight each forward has its own rows.
        pending: list[_RowsWithGradient] = []
        handles.append(layer.register_forward_pre_hook(_enter(pending), with_kwargs=True))
        handles.append(layer.register_forward_hook(_leave(pending)))
    return handles


def _enter(pending: list[_RowsWithGradient]) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        with_gradient = _RowsWithGradient()
        pending.append(with_gradient)
        if "hidden_states" in kwargs:
            hidden = _DropRows.apply(kwargs["hidden_states"], with_gradient)
            return args, kwargs | {"hidden_states": hidden}
        return (_DropRows.apply(args[0], with_gradient), *args[1:]), kwargs

    return hook


def _leave(pending: list[_RowsWithGradient]) -> Callable[..., Tensor | tuple]:
    def hook(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        with_gradient = pending.pop()
        if isinstance(output, tuple):
            return (_RecordRows.apply(output[0], with_gradient), *output[1:])
        return _RecordRows.apply(output, with_gradient)

    return hook
