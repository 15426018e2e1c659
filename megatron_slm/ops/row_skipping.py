"""Layers whose backward follows the selection: gradient rows that are zero take no part in the products.

Exact: in the last transformer layer the gradient of an unselected token is zero in the MLP, in attention's output projection and in its
query, because only keys and values carry one token's loss to another token. `skip_zero_gradient_rows(last_layer)` leaves those rows out.

Approximate, and opt-in: below the last layer every token receives some gradient through keys and values. `drop_unselected_rows(layers)`
drops it at each layer's entry, as Collider (arXiv 2502.00340) does, so that the rows of unselected tokens stay zero all the way down,
across pipeline stages too: which rows are zero is read from the gradient itself, nothing else is sent.

Legend: N rows (tokens, flattened), K rows with a gradient, I and O input and output features of this rank.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.ops.matmul import accumulate_weight_gradient
from megatron_slm.ops.vocab_parallel import all_gather_rows, reduce_scatter_rows


def linear_skipping_zero_rows(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gradient_accumulation_fusion: bool = False,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    grad_output_buffer: None = None,
    wgrad_deferral_limit: None = None,
    blocks: int = 1,
    head_columns: int = 0,
) -> Tensor:
    """F.linear(input, weight, bias) with exact gradients, whose backward products leave out rows of all-zero gradient.

    The arguments are those of megatron-core's linear_with_grad_accumulation_and_async_allreduce, so that it can stand in for it, and two more:
    blocks, head_columns   the output's columns are `blocks` equal blocks (key/value groups), of which the first `head_columns` (the group's queries)
                           leave out their own zero rows and the rest (its key and value) theirs. 0 = all columns leave out the same rows.
    Collectives carry all rows, as megatron-core's do: another tensor rank may have other zero rows.
    """
    if grad_output_buffer is not None:
        raise ValueError(
            "a linear that skips zero rows cannot defer its weight gradient; turn defer_embedding_wgrad_compute off."
        )
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    if (allreduce_dgrad or sequence_parallel) and tp_group is None:
        raise ValueError(
            "allreduce_dgrad and sequence_parallel need tp_group, the tensor-parallel group."
        )
    return _LinearSkippingZeroRows.apply(
        input,
        weight,
        bias,
        gradient_accumulation_fusion,
        allreduce_dgrad and group is not None,
        sequence_parallel and group is not None,
        group,
        (blocks, head_columns),
    )


class _LinearSkippingZeroRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, fused, reduce, sharded, group, columns):
        ctx.save_for_backward(input, weight)
        ctx.columns = columns
        ctx.fused, ctx.reduce, ctx.sharded, ctx.group, ctx.has_bias = (
            fused,
            reduce,
            sharded,
            group,
            bias is not None,
        )
        ctx.parameter = weight if fused else None
        rows = all_gather_rows(input, group) if sharded else input
        output = rows @ weight.t()
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        input, weight = ctx.saved_tensors
        grad_NO = grad_output.reshape(-1, grad_output.shape[-1])
        input_NI = (all_gather_rows(input, ctx.group) if ctx.sharded else input).reshape(
            -1, input.shape[-1]
        )
        parts = [_NonzeroRows(grad_NP) for grad_NP in _part(grad_NO, 1, *ctx.columns)]
        grad_input = _input_gradient(parts, _part(weight, 0, *ctx.columns), input_NI)
        pending = (
            dist.all_reduce(grad_input, group=ctx.group, async_op=True) if ctx.reduce else None
        )
        grad_weight = _weight_gradient(parts, input_NI, weight, ctx.parameter, ctx.columns)
        grad_bias = grad_NO.sum(0) if ctx.has_bias else None
        if pending is not None:
            pending.wait()
        grad_input = grad_input.view(*grad_output.shape[:-1], input.shape[-1])
        if ctx.sharded:
            grad_input = reduce_scatter_rows(grad_input, ctx.group)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _part(tensor: Tensor, dim: int, blocks: int, head_columns: int) -> list[Tensor]:
    """Views of the output features along `dim` as [blocks, features]: every block's first head_columns, and the rest of them."""
    grouped = tensor.unflatten(dim, (blocks, -1))
    if not head_columns:
        return [grouped]
    return list(grouped.split([head_columns, grouped.shape[dim + 1] - head_columns], dim=dim + 1))


class _NonzeroRows:
    """The rows of one part [N, blocks, features] that have a gradient. index_K is None when all have one."""

    def __init__(self, grad_NBP: Tensor):
        index_K = grad_NBP.ne(0).any(2).any(1).nonzero().squeeze(1)
        every_row = len(index_K) == len(grad_NBP)
        self.index_K = None if every_row else index_K
        self.grad_KP = (grad_NBP if every_row else grad_NBP[index_K]).flatten(1)

    def of(self, rows_NI: Tensor) -> Tensor:
        return rows_NI if self.index_K is None else rows_NI[self.index_K]


def _input_gradient(
    parts: list[_NonzeroRows], weights_BPI: list[Tensor], input_NI: Tensor
) -> Tensor:
    """The sum over the parts; the part with the most rows is computed in place, the others are added to their rows."""
    total_NI = None
    for part, weight_BPI in sorted(
        zip(parts, weights_BPI, strict=True), key=lambda pair: -len(pair[0].grad_KP)
    ):
        rows_KI = part.grad_KP @ weight_BPI.flatten(0, 1)
        if total_NI is None and part.index_K is None:
            total_NI = rows_KI
            continue
        total_NI = torch.zeros_like(input_NI) if total_NI is None else total_NI
        if part.index_K is None:
            total_NI += rows_KI
        else:
            total_NI.index_add_(0, part.index_K, rows_KI)
    return total_NI


def _weight_gradient(
    parts: list[_NonzeroRows],
    input_NI: Tensor,
    weight: Tensor,
    parameter: Tensor | None,
    columns: tuple[int, int],
) -> Tensor | None:
    """The gradient autograd gets; with `parameter`, megatron-core's fused accumulation into its fp32 main_grad."""
    if parameter is None:
        products = [
            (part.grad_KP.t() @ part.of(input_NI)).unflatten(0, (columns[0], -1)) for part in parts
        ]
        return (
            torch.cat(products, dim=1).flatten(0, 1)
            if len(products) > 1
            else products[0].flatten(0, 1)
        )
    total_OI = parameter.main_grad
    for part, total_BPI in zip(parts, _part(total_OI, 0, *columns), strict=True):
        grad_KP, input_KI = part.grad_KP, part.of(input_NI)
        if grad_KP.device.type == "cpu":
            grad_KP, input_KI = grad_KP.float(), input_KI.float()
        if len(parts) == 1:
            accumulate_weight_gradient(total_OI, grad_KP, input_KI, fresh=False)
        else:  # a part's features are not contiguous in main_grad, which a product cannot write to
            product = torch.empty(total_BPI.shape, dtype=total_OI.dtype, device=total_OI.device)
            accumulate_weight_gradient(product.flatten(0, 1), grad_KP, input_KI, fresh=True)
            total_BPI.add_(product)
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return (
        torch.zeros_like(weight)
        if getattr(parameter, "zero_out_wgrad", False)
        else torch.empty_like(weight)
    )


def skip_zero_gradient_rows(module: nn.Module) -> int:
    """Make megatron-core's parallel linears inside `module` skip zero gradient rows; exact. Returns how many were changed.

    linear_qkv's columns are, per key/value group, the group's queries, its key and its value: queries leave out their own zero rows, keys and
    values theirs. Worth it for the last layer (and for every layer when unselected rows are dropped). ValueError when there is none to change:
    Transformer Engine's layers have products of their own.
    """
    changed = 0
    for part in module.modules():
        if hasattr(part, "_forward_impl") and part.weight is not None and part.weight.requires_grad:
            part._forward_impl = linear_skipping_zero_rows
            changed += 1
    for attention in module.modules():
        qkv = getattr(attention, "linear_qkv", None)
        if getattr(qkv, "_forward_impl", None) is linear_skipping_zero_rows:
            groups = attention.num_query_groups_per_partition
            queries = (
                attention.num_attention_heads_per_partition
                // groups
                * attention.hidden_size_per_attention_head
            )
            qkv._forward_impl = partial(
                linear_skipping_zero_rows, blocks=groups, head_columns=queries
            )
    if not changed:
        raise ValueError(
            f"{type(module).__name__} has no trainable megatron-core linear layer. Use the torch-native layers (device.layers: torch), "
            "or turn the row-skipping backward off."
        )
    return changed


class _RowsWithGradient:
    """Which rows of one layer's output carried a gradient in the backward now running."""

    def __init__(self):
        self.rows: Tensor | None = None


class _RecordRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, selection: _RowsWithGradient) -> Tensor:
        ctx.selection = selection
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.selection.rows = grad.ne(0).any(-1, keepdim=True)
        return grad, None


class _DropRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, selection: _RowsWithGradient) -> Tensor:
        ctx.selection = selection
        return input.view_as(input)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, ctx.selection.rows = ctx.selection.rows, None
        return torch.where(rows, grad, 0.0), None


def drop_unselected_rows(layers: Iterable[nn.Module]) -> list[torch.utils.hooks.RemovableHandle]:
    """APPROXIMATE: gradients of parameters below change. Tokens without a gradient at a layer's exit get none at its entry.

    `layers` are called with the hidden states first (or as hidden_states=...) and return them, alone or first of a tuple. What is
    lost: the gradient that selected tokens send to earlier unselected tokens through keys and values, below that layer; within
    the layer keys and values keep theirs. Remove the returned handles to have exact gradients again. Not with activation recompute
    of whole layers: the second forward would run inside backward.
    """
    handles = []
    for layer in layers:
        # One queue per layer: with several micro-batches in flight each forward makes its own selection.
        pending: list[_RowsWithGradient] = []
        handles.append(layer.register_forward_pre_hook(_enter(pending), with_kwargs=True))
        handles.append(layer.register_forward_hook(_leave(pending)))
    return handles


def _enter(pending: list[_RowsWithGradient]):
    def hook(_, args: tuple, kwargs: dict):
        selection = _RowsWithGradient()
        pending.append(selection)
        if "hidden_states" in kwargs:
            return args, kwargs | {
                "hidden_states": _DropRows.apply(kwargs["hidden_states"], selection)
            }
        return (_DropRows.apply(args[0], selection), *args[1:]), kwargs

    return hook


def _leave(pending: list[_RowsWithGradient]):
    def hook(_, __, output):
        selection = pending.pop()
        if isinstance(output, tuple):
            return (_RecordRows.apply(output[0], selection), *output[1:])
        return _RecordRows.apply(output, selection)

    return hook
