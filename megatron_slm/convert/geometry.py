"""The sizes that a conversion needs; no torch."""

import math
from dataclasses import dataclass

from megatron_slm.config.schema import ModelConfig


@dataclass(frozen=True)
class Geometry:
    """The sizes a conversion needs, with every "0 = default" of ModelConfig resolved."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    groups: int
    head_size: int
    vocabulary_size: int
    padded_vocabulary_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    attention_output_bias: bool = False
    feed_forward_bias: bool = False
    gated: bool = True
    """Whether a feed-forward layer has a gate."""
    norm_bias: bool = False
    """Whether norms have a bias: LayerNorm."""
    positions: int = 0
    """Rows of a table of learned positions."""
    norms_before: bool = True
    """Whether attention and feed-forward layer have norms before them."""
    norms_after: bool = False
    """Whether their outputs have norms."""
    norm_over_all_heads: bool = False
    """Whether a norm of queries or keys is over all heads of a token together."""

    @classmethod
    def from_model(cls, model: ModelConfig) -> "Geometry":
        """ValueError when the vocabulary size is not known or the query heads do not fall into
        equal groups.
        """
        if model.vocabulary_size <= 0:
            raise ValueError(
                "model.vocabulary_size is 0; a conversion needs the true vocabulary size of the "
                "tokenizer"
            )
        groups = model.query_groups or model.attention_heads
        if model.attention_heads % groups:
            raise ValueError(
                f"model.query_groups {groups} must divide model.attention_heads "
                f"{model.attention_heads}"
            )
        multiple = max(1, model.pad_vocabulary_to_multiple_of)
        return cls(
            layers=model.layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            heads=model.attention_heads,
            groups=groups,
            head_size=model.head_size or model.hidden_size // model.attention_heads,
            vocabulary_size=model.vocabulary_size,
            padded_vocabulary_size=math.ceil(model.vocabulary_size / multiple) * multiple,
            tied=model.tied_embeddings,
            qkv_bias=model.qkv_bias,
            qk_norm=model.qk_norm,
            experts=model.experts,
            attention_output_bias=model.attention_output_bias,
            feed_forward_bias=model.feed_forward_bias,
            gated=model.gated_feed_forward,
            norm_bias=model.normalization == "layernorm",
            positions=model.learned_positions,
            norms_before=model.norm_placement != "after",
            norms_after=model.norm_placement != "before",
            norm_over_all_heads=model.qk_norm_over == "all_heads",
        )
