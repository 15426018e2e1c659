"""Norms in other places than before attention and the feed-forward layer: OLMo 2, OLMo 3, Gemma.

Legend: S tokens of a sequence on this rank, B sequences, H hidden, N heads on this rank (of
queries, or of keys), D head size.
"""

from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.layers import RMSNorm
from megatron_slm.ops.split_rms_norm import split_rms_norm


def place_norms(chunk: Any, model: ModelConfig) -> None:
    """Give the torch-native layers of `chunk`, a GPTModel, the norms that `model` asks for.

    norm_placement after: x + norm(attention(x)), and the same of the feed-forward layer. both: x +
    norm(attention(norm(x))). qk_norm_over all_heads: NormOverAllHeads on queries and on keys.

    It comes before weights are drawn or loaded. Under sequence parallelism the outputs are split
    over the sequence like the residual stream, and so are these norms.
    """
    for layer in chunk.decoder.layers:
        if model.norm_placement != "before":
            _add_output_norms(layer)
        if model.norm_placement == "after":
            layer.input_layernorm = IdentityOp()
            layer.pre_mlp_layernorm = IdentityOp()
        if model.qk_norm and model.qk_norm_over == "all_heads":
            _add_norms_over_all_heads(layer.self_attention)


def _add_output_norms(layer: Any) -> None:
    config = layer.config
    for name, addition in (
        ("post_self_attn_layernorm", "self_attn_bda"),
        ("post_mlp_layernorm", "mlp_bda"),
    ):
        norm = type(layer.input_layernorm)(config, config.hidden_size, eps=config.layernorm_epsilon)
        layer.add_module(name, norm)
        setattr(layer, addition, _NormedAddition(norm, getattr(layer, addition)))


class _NormedAddition:
    """megatron-core's bias-dropout-add of a layer, after a norm of what it adds.

    It is no module: the norm belongs to the layer, and stands in checkpoints under that name alone.
    """

    def __init__(self, norm: nn.Module, addition: Any):
        self.norm = norm
        self.addition = addition

    def __call__(self, training: bool, fused: bool) -> Any:
        add = self.addition(training, fused)

        def add_normed(
            output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
        ) -> Tensor:
            output_SBH, bias_H = output_with_bias
            if bias_H is not None:
                output_SBH = output_SBH + bias_H
            return add((self.norm(output_SBH), None), residual, dropout)

        return add_normed


def _add_norms_over_all_heads(attention: Any) -> None:
    """megatron-core takes weights of norms named qk_layernorm for copies that every tensor rank
    has, and sums their gradients; without that option it builds none, and these are added to it.
    """
    config, group = attention.config, attention.pg_collection.tp
    attention.q_layernorm = NormOverAllHeads(config, config.num_attention_heads, group)
    attention.k_layernorm = NormOverAllHeads(config, config.num_query_groups, group)


class NormOverAllHeads(RMSNorm):
    """RMSNorm of the queries (or keys) of a token, all heads of all tensor ranks together.

    [S, B, N, D] -> the same. Equals torch.nn.functional.rms_norm of the whole projection, as in
    OLMo 2 (arXiv 2501.00656). Each rank has the part of the weight that belongs to its heads; the
    mean square, and in backward one mean more, are summed over the tensor group.
    """

    def __init__(self, config: TransformerConfig, heads: int, group: dist.ProcessGroup):
        assert config.kv_channels is not None  # transformer_config gives it
        width = heads * config.kv_channels // group.size()
        super().__init__(config, width, eps=config.layernorm_epsilon)
        self.group = group
        # A part of a weight, of whole sequences: no rank's gradient is added to another's.
        vars(self.weight)["sequence_parallel"] = False
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads_SBND: Tensor) -> Tensor:
        row = heads_SBND.flatten(2)
        if self.group.size() == 1:
            return super().forward(row).view(heads_SBND.shape)
        normed = split_rms_norm(row, self.factor(), self.epsilon, self.group)
        return normed.view(heads_SBND.shape)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> dict[str, Any]:
        """The weight as one tensor that is split over the tensor group."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
