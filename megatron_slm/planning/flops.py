"""The work of one token that MFU is measured against: the model's own, without recomputation."""

from dataclasses import dataclass

from megatron_slm.config.schema import ModelConfig


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations (a multiply and an add are two) for one token of one forward pass."""

    attention_projections: int
    attention_core: int
    feed_forward: int
    head: int

    @property
    def forward(self) -> int:
        return self.attention_projections + self.attention_core + self.feed_forward + self.head

    @property
    def training(self) -> int:
        """Forward plus backward (gradients of inputs and of weights: twice the forward).

        Recomputation is not counted.
        """
        return 3 * self.forward


def feed_forward_products(model: ModelConfig) -> int:
    """Matrices of a feed-forward layer: gate, up and down, or up and down."""
    return 3 if model.gated_feed_forward else 2


def model_flops_per_token(
    model: ModelConfig, sequence_length: int, vocabulary_size: int
) -> FlopsPerToken:
    """Matrix-multiply FLOPs of the decoder, per token; a [1, m] x [m, n] product is 2mn.

    With H = hidden, L = layers, a = query heads, g = key/value heads, d = head size, F =
    feed-forward, S = sequence, V = vocabulary, E = experts, k = experts per token:
      projections  L * 2H(a + 2g)d + L * 2adH      queries, keys and values; output
      core         L * 4ad(S + 1)/2                q·k and p·v against the (S + 1)/2 positions a
                   causal mask shows on average
                   L * 4ad(W - W(W - 1)/2S)        in layers with a window of W < S tokens
      feed-forward L * 6HF                         gate, up and down; 4HF without a gate
                   L * (6HFk + 2HE)                with experts: k of them per token, and the router
      head         2HV                             the embedding is a lookup and costs none
    """
    head_size = model.head_size or model.hidden_size // model.attention_heads
    query_groups = model.query_groups or model.attention_heads
    query_width = model.attention_heads * head_size
    feed_forward = 2 * feed_forward_products(model) * model.hidden_size * model.ffn_hidden_size
    if model.experts:
        feed_forward = (
            feed_forward * model.experts_per_token + 2 * model.hidden_size * model.experts
        )
    projections = 2 * model.hidden_size * (2 * query_width + 2 * query_groups * head_size)
    return FlopsPerToken(
        attention_projections=model.layers * projections,
        attention_core=_attention_core(model, query_width, sequence_length),
        feed_forward=model.layers * feed_forward,
        head=2 * model.hidden_size * vocabulary_size,
    )


def _attention_core(model: ModelConfig, query_width: int, sequence_length: int) -> int:
    """The attention cores of all layers, with and without a sliding window."""
    window = model.attention_window_tokens
    windowed = 0
    if 0 < window < sequence_length:
        windowed = model.layers - len(set(model.full_attention_layers))
    full = (model.layers - windowed) * 2 * query_width * (sequence_length + 1)
    seen = window * sequence_length - window * (window - 1) // 2  # by all tokens of a sequence
    return full + windowed * 4 * query_width * seen // sequence_length
