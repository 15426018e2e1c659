"""Fields of ModelConfig that make a tiny model of any size one of a known family's kind."""

NEOX = dict(
    normalization="layernorm",
    activation="gelu",
    gated_feed_forward=False,
    qkv_bias=True,
    attention_output_bias=True,
    feed_forward_bias=True,
    rope_fraction=0.5,
    parallel_residual=True,
)
GPT_2 = NEOX | dict(
    activation="gelu_tanh",
    rope_fraction=1.0,
    parallel_residual=False,
    position_embedding="learned",
    tied_embeddings=True,
)
"""learned_positions is still to be given."""
OLMO_2 = dict(norm_placement="after", qk_norm=True, qk_norm_over="all_heads")
OLMO_3 = OLMO_2 | dict(rope_base_windowed=10000.0, rope_scaling="yarn", rope_scaling_factor=4.0)
"""rope_original_sequence_length and windows are still to be given, as in GEMMA_3."""
GEMMA_3 = dict(
    activation="gelu_tanh",
    norm_placement="both",
    zero_centered_norms=True,
    qk_norm=True,
    tied_embeddings=True,
    rope_base_windowed=100.0,
    rope_scaling="linear",
)
