"""Variants of megatron-core's layer and attention that its configuration has no option for.

They work with the torch-native layers and with Transformer Engine's.
"""

import copy
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """A layer whose attention and feed-forward part both read the hidden state x that comes in
    (GPT-J, GPT-NeoX):

        x + attention(norm_1(x)) + feed_forward(norm_2(x))

    TransformerLayer gives x + attention(norm_1(x)) to the second norm. Here the feed-forward part
    is called with x, and what it adds its output to is replaced by that sum.
    """

    parallel_residual = True
    """Read by ops.row_skipping: backward of the two parts comes in no certain order."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._after_attention: Tensor | None = None
        """x + attention(norm_1(x)) of the forward that is running."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        options.pop("dynamic_inference_decode_only", None)
        hidden_SBH = options["hidden_states"] if "hidden_states" in options else arguments[0]
        self._after_attention, context = self._forward_attention(*arguments, **options)
        try:
            output_SBH = self._forward_mlp(hidden_SBH, padding_mask=options.get("padding_mask"))
        finally:
            self._after_attention = None
        return output_SBH, context

    def _forward_post_mlp(self, mlp_output_with_bias: Any, residual: Tensor) -> Tensor:
        assert self._after_attention is not None, "it is called by forward alone"
        return super()._forward_post_mlp(mlp_output_with_bias, self._after_attention)


class SelfAttentionWithOwnBias(SelfAttention):
    """SelfAttention whose output projection has a bias or none whatever the feed-forward layer has.

    megatron-core's add_bias_linear means both. Attention reads it in its constructor alone.
    """

    def __init__(
        self, config: TransformerConfig, *arguments: Any, output_bias: bool, **options: Any
    ):
        own = copy.copy(config)
        own.add_bias_linear = output_bias
        super().__init__(own, *arguments, **options)
