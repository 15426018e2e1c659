"""Torch-native layers whose norms, SwiGLU and rotary embedding are the passes of ops.layer_passes.

Legend: S tokens of a sequence on this rank, B sequences, H hidden, D head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_slm.model.layers import RMSNorm
from megatron_slm.ops.layer_passes import rms_norm, rotary, split_rotary, swiglu


def use_fused_passes(chunk: nn.Module) -> None:
    """Change the torch-native layers inside `chunk`, a GPTModel, to fused passes; same parameters.

    Norms that have apex's kernel keep it, and the SwiGLU of experts, which also weighs their
    tokens, stays megatron-core's. So does what there is no pass for: LayerNorm, another activation,
    biases of the feed-forward layer, an embedding that turns a part of each head
    (training/acceleration_rows.py says so). Values differ from those of the layers as they were by
    rounding: what is rounded once here was rounded after every operation, cosines and sines too.
    """
    layers: list[Any] = list(chunk.modules())  # megatron-core's layers have no types
    for layer in layers:
        if isinstance(layer, RMSNorm) and layer.fused is None:
            layer.fused = _norm
        elif type(layer) is MLP and _is_swiglu(layer.config):
            layer.forward = partial(_gated_mlp, layer, layer.forward)
        elif isinstance(layer, SelfAttention):
            rotation = _RotationBeforeAttention(layer)
            layer.forward = rotation.forward
            layer.get_query_key_value_tensors = rotation.query_key_value


def _is_swiglu(config: TransformerConfig) -> bool:
    gated = config.gated_linear_unit and config.activation_func is nn.functional.silu
    return gated and not config.add_bias_linear


def _norm(hidden_SBH: Tensor, weight_H: Tensor, shape: tuple[int], epsilon: float) -> Tensor:
    """rms_norm with the arguments of apex's."""
    assert shape == weight_H.shape
    return rms_norm(hidden_SBH, weight_H, epsilon)


def _gated_mlp(
    mlp: Any,
    plain: Callable[..., Any],
    hidden_SBH: Tensor,
    per_token_scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """MLP.forward; `plain` is the original."""
    if per_token_scale is not None:
        return plain(hidden_SBH, per_token_scale=per_token_scale, **options)
    gate_and_up, bias = mlp.linear_fc1(hidden_SBH)
    assert bias is None, "the linear layers of a feed-forward layer have no bias"
    return mlp.linear_fc2(swiglu(gate_and_up))


class _RotationBeforeAttention:
    """Two methods of one SelfAttention: queries and keys are turned where they are split, by one
    pass over both, and not afterwards one by one.
    """

    def __init__(self, attention: Any):
        self.attention = attention
        self.plain_forward = attention.forward
        self.plain_query_key_value = attention.get_query_key_value_tensors
        self.head_size = attention.hidden_size_per_attention_head
        # Without norms of queries and keys, and with whole groups on this rank, the joint product
        # is split in the same pass.
        norms = (attention.q_layernorm, attention.k_layernorm)
        self.splits = (
            # megatron-core 0.16.1 has an IdentityOp where there is none, 0.19.2 has None.
            all(norm is None or isinstance(norm, IdentityOp) for norm in norms)
            and attention.config.num_query_groups >= attention.world_size
        )
        not_rotated = attention.config.no_rope_freq
        self.rotates = not (not_rotated and not_rotated[attention.layer_number - 1])
        self.angle_S11D: Tensor | None = None
        """Of the forward that is running; None in a layer without rotary embedding."""

    def forward(self, *arguments: Any, rotary_pos_emb: Tensor | None = None, **options: Any) -> Any:
        """SelfAttention.forward; the angles of megatron-core repeat D / 2 frequencies."""
        if rotary_pos_emb is None or not self.rotates or rotary_pos_emb.shape[-1] < self.head_size:
            return self.plain_forward(*arguments, rotary_pos_emb=rotary_pos_emb, **options)
        self.angle_S11D = rotary_pos_emb
        try:
            return self.plain_forward(*arguments, rotary_pos_emb=None, **options)
        finally:
            self.angle_S11D = None

    def query_key_value(
        self, hidden_SBH: Tensor, key_value_states: None = None, **options: Any
    ) -> tuple[Tensor, ...]:
        """SelfAttention.get_query_key_value_tensors, with queries and keys turned."""
        if self.angle_S11D is None:
            return self.plain_query_key_value(hidden_SBH, key_value_states, **options)
        angle_SP = self.angle_S11D[:, 0, 0, : self.angle_S11D.shape[-1] // 2]
        cosine_SP, sine_SP = angle_SP.cos(), angle_SP.sin()
        if self.splits:
            mixed, _ = self.attention.linear_qkv(hidden_SBH)
            groups = self.attention.num_query_groups_per_partition
            return split_rotary(mixed.unflatten(-1, (groups, -1)), cosine_SP, sine_SP)
        query, key, value = self.plain_query_key_value(hidden_SBH, key_value_states, **options)
        return (*rotary(query, key, cosine_SP, sine_SP), value)
