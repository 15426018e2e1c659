"""Layers whose backward follows the selection: all-zero gradient rows stay out of the products.

This is exact. In the last transformer layer the gradient of an unselected token is zero in the MLP,
in attention's output projection and in its query, because only keys and values carry one token's
loss to another token. `skip_zero_gradient_rows(last_layer)` leaves those rows out. Below the last
layer every token receives some gradient; row_dropping.py drops it, which is not exact.

What it costs is in row_moves.py: the rows of a transformer layer are looked for once, in the
gradient of its last product, and gathered for each product.

Legend: N rows (tokens, flattened), K rows with a gradient, I and O input and output features of
this rank, B blocks of output features, P features of one part of a block.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from megatron_slm.ops.matmul import accumulate_weight_gradient
from megatron_slm.ops.row_moves import Rows
from megatron_slm.ops.vocab_parallel import all_gather_rows, reduce_scatter_rows
from megatron_slm.ops.weight_gradient import ParameterWithMainGrad, placeholder_gradient

Place = Literal["alone", "first", "inner", "last"]
"""Of a linear among those that share a layer's rows; forward runs from first to last."""


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
    gtp_remat_size: int = 1,
    blocks: int = 1,
    head_columns: int = 0,
    layer_rows: "LayerRows | None" = None,
    place: Place = "alone",
) -> Tensor:
    """F.linear(input, weight, bias), whose backward products leave out all-zero gradient rows.

    The gradients are exact. The arguments are those of megatron-core's
    linear_with_grad_accumulation_and_async_allreduce, so that it can stand in for that function,
    and four more:

    blocks, head_columns   the output's columns are `blocks` equal blocks (key/value groups). The
                           first `head_columns` of each (the group's queries) leave out their
                           zero rows, the others (its key and value) none: a selected token's loss
                           reaches nearly all earlier ones. 0 = all columns leave out their rows.
    layer_rows, place      the linears of one layer that share the rows; where this one stands.

    Collectives carry all rows, as megatron-core's do: another tensor rank may have other zero rows.
    """
    if grad_output_buffer is not None:
        raise ValueError(
            "a linear that skips zero rows cannot defer its weight gradient; "
            "turn defer_embedding_wgrad_compute off."
        )
    if gtp_remat_size > 1:
        raise ValueError(
            f"a linear that skips zero rows needs its whole weight, and gtp_remat_size is "
            f"{gtp_remat_size}; leave megatron-core's sharding of weights (GTP) off."
        )
    if (allreduce_dgrad or sequence_parallel) and tp_group is None:
        raise ValueError(
            "allreduce_dgrad and sequence_parallel need tp_group, the tensor-parallel group."
        )
    several_ranks = tp_group is not None and tp_group.size() > 1
    return _LinearSkippingZeroRows.apply(
        input,
        weight,
        bias,
        gradient_accumulation_fusion,
        tp_group if several_ranks and allreduce_dgrad else None,
        tp_group if several_ranks and sequence_parallel else None,
        (blocks, head_columns),
        (layer_rows, place),
    )


class LayerRows:
    """The rows with a gradient in one transformer layer, in the backward now running.

    Its linears act on one token at a time, and so does what lies between them, but for keys and
    values: in backward a row that is zero at the layer's output stays zero down to the queries.
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None

    def of(self, grad_NBP: Tensor, place: Place) -> Rows:
        """The rows of a linear's gradient. Without any of this backward they are looked for."""
        rows = self.rows
        if place == "last" or rows is None or rows.count != len(grad_NBP):
            rows = Rows.with_gradient(grad_NBP)
        # Kept from the layer's last linear, the first of backward, until its first has used them.
        self.rows = rows if place == "last" else self.rows
        if place == "first":
            self.rows = None
        return rows


class _LinearContext(FunctionCtx):
    """What forward saves for backward."""

    parameter: ParameterWithMainGrad | None
    """None where autograd takes the weight's gradient."""
    reduce_group: dist.ProcessGroup | None
    """Ranks whose gradients of the input are added up; None = nothing to add."""
    shard_group: dist.ProcessGroup | None
    """Ranks over which the input's rows are sharded; None = each has all rows."""
    columns: tuple[int, int]
    sharing: tuple[LayerRows | None, Place]
    has_bias: bool
    saved_tensors: tuple[Tensor, ...]


class _LinearSkippingZeroRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LinearContext,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fused: bool,
        reduce_group: dist.ProcessGroup | None,
        shard_group: dist.ProcessGroup | None,
        columns: tuple[int, int],
        sharing: tuple[LayerRows | None, Place],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.parameter = cast(ParameterWithMainGrad, weight) if fused else None
        ctx.reduce_group = reduce_group
        ctx.shard_group = shard_group
        ctx.columns = columns
        ctx.sharing = sharing
        ctx.has_bias = bias is not None
        rows = input if shard_group is None else all_gather_rows(input, shard_group)
        output = rows @ weight.t()
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: _LinearContext, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_NO = grad_output.reshape(-1, grad_output.shape[-1])
        whole = input if ctx.shard_group is None else all_gather_rows(input, ctx.shard_group)
        input_NI = whole.reshape(-1, input.shape[-1])
        parts = _gathered(_parts(grad_NO, 1, *ctx.columns), *ctx.sharing)
        grad_input = _input_gradient(parts, _parts(weight, 0, *ctx.columns))
        pending = None
        if ctx.reduce_group is not None:  # runs while the weight's gradient is computed
            pending = dist.all_reduce(grad_input, group=ctx.reduce_group, async_op=True)
        if ctx.parameter is None:
            grad_weight: Tensor | None = _weight_gradient(parts, input_NI, ctx.columns[0])
        else:
            _add_to_main_grad(parts, input_NI, ctx.parameter.main_grad, ctx.columns)
            grad_weight = placeholder_gradient(ctx.parameter)
        grad_bias = grad_NO.sum(0) if ctx.has_bias else None
        if pending is not None:
            pending.wait()
        grad_input = grad_input.view(*grad_output.shape[:-1], input.shape[-1])
        if ctx.shard_group is not None:
            grad_input = reduce_scatter_rows(grad_input, ctx.shard_group)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _parts(tensor: Tensor, dim: int, blocks: int, head_columns: int) -> list[Tensor]:
    """Views of the output features along `dim`: every block's first head_columns, and the rest.

    The dimension becomes [blocks, features of the part]. With head_columns 0 there is one part.
    """
    grouped = tensor.unflatten(dim, (blocks, -1))
    if not head_columns:
        return [grouped]
    return list(grouped.split([head_columns, grouped.shape[dim + 1] - head_columns], dim=dim + 1))


class _Part(NamedTuple):
    """One part of the output features."""

    rows: Rows
    grad_KP: Tensor


def _gathered(grads_NBP: list[Tensor], layer_rows: LayerRows | None, place: Place) -> list[_Part]:
    """The first part's rows with a gradient, and all rows of the second."""
    first = grads_NBP[0]
    rows = Rows.with_gradient(first) if layer_rows is None else layer_rows.of(first, place)
    parts = [_Part(rows, rows.of(first))]
    for grad_NBP in grads_NBP[1:]:
        every_row = Rows(len(grad_NBP), None)
        parts.append(_Part(every_row, every_row.of(grad_NBP)))
    return parts


def _input_gradient(parts: list[_Part], weights_BPI: list[Tensor]) -> Tensor:
    """The gradient of the input, summed over the parts: those with all rows first."""
    total_NI: Tensor | None = None
    for part, weight_BPI in reversed(list(zip(parts, weights_BPI, strict=True))):
        total_NI = part.rows.spread(part.grad_KP @ weight_BPI.flatten(0, 1), total_NI)
    assert total_NI is not None, "there is at least one part"
    return total_NI


def _weight_gradient(parts: list[_Part], input_NI: Tensor, blocks: int) -> Tensor:
    products = [
        (part.grad_KP.t() @ part.rows.of(input_NI)).unflatten(0, (blocks, -1)) for part in parts
    ]
    whole = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    return whole.flatten(0, 1)


def _add_to_main_grad(
    parts: list[_Part], input_NI: Tensor, main_grad_OI: Tensor, columns: tuple[int, int]
) -> None:
    """Add the weight's gradient in fp32."""
    for part, total_BPI in zip(parts, _parts(main_grad_OI, 0, *columns), strict=True):
        grad_KP, input_KI = part.grad_KP, part.rows.of(input_NI)
        if grad_KP.device.type == "cpu":
            grad_KP, input_KI = grad_KP.float(), input_KI.float()
        if len(parts) == 1:
            accumulate_weight_gradient(main_grad_OI, grad_KP, input_KI, fresh=False)
            continue
        # A part's features are not contiguous in main_grad, and a product cannot write to them.
        product_BPI = torch.empty(
            total_BPI.shape, dtype=main_grad_OI.dtype, device=main_grad_OI.device
        )
        accumulate_weight_gradient(product_BPI.flatten(0, 1), grad_KP, input_KI, fresh=True)
        total_BPI.add_(product_BPI)


def skip_zero_gradient_rows(module: nn.Module) -> int:
    """Make megatron-core's parallel linears inside `module` skip zero gradient rows; exact.

    Returns how many were changed. linear_qkv's columns are, per key/value group, the group's
    queries, its key and its value: queries leave out their zero rows, keys and values none.
    Worth it for the last layer (and for every layer when unselected rows are dropped). ValueError
    when there is none to change: Transformer Engine's layers have products of their own.
    """
    changed = 0
    layers: list[Any] = list(module.modules())  # megatron-core's layers have no types
    for layer in layers:
        linear = hasattr(layer, "_forward_impl") and layer.weight is not None
        if linear and layer.weight.requires_grad:
            layer._forward_impl = linear_skipping_zero_rows
            changed += 1
    for layer in layers:
        if hasattr(layer, "self_attention"):
            _share_rows(layer)
    if not changed:
        raise ValueError(
            f"{type(module).__name__} has no trainable megatron-core linear layer. Use the "
            "torch-native layers (device.layers: torch), or turn the row-skipping backward off."
        )
    return changed


def _share_rows(layer: Any) -> None:
    """Let the linears of a transformer layer look for its rows once, and split its linear_qkv.

    The experts of a mixture see their tokens in an order of their own, and in a layer with a
    parallel residual (`parallel_residual` set) backward of attention may come before that of the
    feed-forward layer: there each linear looks for its rows itself. So it does in a layer with
    norms on the outputs of its parts: where such a norm rounds a row's gradient to zero, the
    residual stream still carries that row to attention.
    """
    attention = layer.self_attention
    groups = attention.num_query_groups_per_partition
    queries = attention.num_attention_heads_per_partition // groups
    split = {"blocks": groups, "head_columns": queries * attention.hidden_size_per_attention_head}
    dense = hasattr(layer.mlp, "linear_fc2")
    in_order = dense and not getattr(layer, "parallel_residual", False)
    shared = in_order and not hasattr(layer, "post_mlp_layernorm")
    layer_rows = LayerRows() if shared else None
    _set_options(attention.linear_qkv, layer_rows, "first", **split)
    _set_options(attention.linear_proj, layer_rows, "inner")
    if dense:
        _set_options(layer.mlp.linear_fc1, layer_rows, "inner")
        _set_options(layer.mlp.linear_fc2, layer_rows, "last")


def _set_options(linear: Any, layer_rows: LayerRows | None, place: Place, **split: int) -> None:
    """Where the linear skips rows: a frozen one does not."""
    if linear._forward_impl is linear_skipping_zero_rows:
        linear._forward_impl = partial(
            linear_skipping_zero_rows, layer_rows=layer_rows, place=place, **split
        )
