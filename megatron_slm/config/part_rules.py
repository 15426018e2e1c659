"""Rules about the parts of a model: positions, norms, biases, the feed-forward layer."""

from collections.abc import Iterator

from megatron_slm.config.architecture import ROPE_BY_LENGTH, ROPE_WITH_ATTENTION_FACTOR
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.config.sizes import rotated_channels

_ROPE_ALONE = (
    "rope_base",
    "rope_base_windowed",
    "rope_scaling",
    "rope_fraction",
    "layers_without_rope",
)
"""Settings that say something about a rotary embedding, whatever their value is."""


def part_problems(config: Config, world_size: int) -> Iterator[str]:
    """One sentence for each broken rule."""
    model = config.model
    if model.position_embedding == "rope":
        yield from _rope(model)
        yield from _rope_by_length(config)
    else:
        yield from _learned_positions(config)
    yield from _experts(model)
    yield from _norms(model)
    if model.attention_output_bias and not model.qkv_bias:
        yield (
            "model.attention_output_bias: got true with qkv_bias false; megatron-core's attention "
            "has a bias on its output together with those on its input alone: set qkv_bias to true"
        )


def _rope(model: ModelConfig) -> Iterator[str]:
    if model.learned_positions:
        yield (
            f"model.learned_positions: got {model.learned_positions} with position_embedding "
            "rope, which has no table: set it to 0, or position_embedding to learned"
        )
    if model.attention_heads and model.rope_fraction < 1:
        channels = rotated_channels(model)
        if channels % 2 or not channels:
            yield (
                f"model.rope_fraction: got {model.rope_fraction}, which is {channels} channels of "
                "a head; rotary embeddings turn pairs: choose an even number of channels"
            )
    if model.rope_fraction < 1 and model.rope_scaling in ROPE_WITH_ATTENTION_FACTOR:
        yield (
            f"model.rope_fraction: got {model.rope_fraction} with rope_scaling "
            f"{model.rope_scaling}, which makes the attention of whole heads sharper here, not "
            "that of the turned channels alone: use another rope_scaling, or rope_fraction 1"
        )


def _rope_by_length(config: Config) -> Iterator[str]:
    """Rules of the scalings that depend on the length of the sequences."""
    model, length = config.model, config.data.sequence_length
    original = model.rope_original_sequence_length
    if model.rope_scaling not in ROPE_BY_LENGTH or not model.attention_heads:
        return
    pairs = rotated_channels(model) // 2
    if model.rope_scaling == "longrope":
        for name in ("rope_short_factors", "rope_long_factors"):
            given = len(getattr(model, name))
            if given != pairs:
                yield f"model.{name}: got {given} numbers; expected {pairs}, half of the head size"
        if original < 2:
            yield f"model.rope_original_sequence_length: got {original}; expected at least 2"
    elif pairs < 2:
        yield f"model.head_size: got {2 * pairs} with rope_scaling dynamic; expected at least 4"
    if config.data.document_policy == "isolated" and length > original:
        yield (
            f"data.document_policy: got isolated with rope_scaling {model.rope_scaling} and "
            f"sequence_length {length}, above model.rope_original_sequence_length ({original}); "
            "shorter documents would be rotated as long ones: use packed, or lower "
            "data.sequence_length"
        )


def _norms(model: ModelConfig) -> Iterator[str]:
    if model.qk_norm_over == "all_heads" and not model.qk_norm:
        yield (
            "model.qk_norm_over: got all_heads with qk_norm false; queries and keys have no norm: "
            "set model.qk_norm to true, or leave qk_norm_over out"
        )
    if model.normalization == "layernorm":
        for name, value in (("qk_norm_over", "all_heads"), ("zero_centered_norms", True)):
            if getattr(model, name) == value:
                yield (
                    f"model.{name}: got {str(value).lower()} with normalization layernorm; it is "
                    "implemented for RMSNorm alone: leave it out, or set normalization to rmsnorm"
                )
    if model.parallel_residual and model.norm_placement != "before":
        yield (
            f"model.norm_placement: got {model.norm_placement} with parallel_residual true, whose "
            "parts have norms before them alone: set norm_placement to before, or "
            "parallel_residual to false"
        )


def _learned_positions(config: Config) -> Iterator[str]:
    model, length = config.model, config.data.sequence_length
    if model.learned_positions < length:
        yield (
            f"model.learned_positions: got {model.learned_positions}; the table must have a row "
            f"for each of the {length} positions of data.sequence_length: make the table larger, "
            "or the sequences shorter"
        )
    default = ModelConfig()
    for name in _ROPE_ALONE:
        if getattr(model, name) != getattr(default, name):
            yield (
                f"model.{name}: got {getattr(model, name)} with position_embedding learned, which "
                "has no rotary embedding: leave it out"
            )


def _experts(model: ModelConfig) -> Iterator[str]:
    """A mixture has the experts that Mixtral and Qwen3-MoE have; megatron-core refuses biases in it
    and has no fused pass for another activation.
    """
    if not model.experts:
        return
    expected = {"activation": "silu", "gated_feed_forward": True, "feed_forward_bias": False}
    for name, value in expected.items():
        if getattr(model, name) != value:
            yield (
                f"model.{name}: got {str(getattr(model, name)).lower()} with model.experts "
                f"{model.experts}; experts are SwiGLU layers without biases: set it to "
                f"{str(value).lower()}, or experts to 0"
            )
