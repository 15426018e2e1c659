"""Rotary embedding stretched to sequences longer than a model was first trained on."""

import math
from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.utils import is_layer_window_attention
from torch import nn

from megatron_slm.config.architecture import ROPE_WITH_ATTENTION_FACTOR
from megatron_slm.config.schema import ModelConfig


def scaled_frequencies(
    frequency_D: torch.Tensor, model: ModelConfig, sequence_length: int
) -> torch.Tensor:
    """Rotary frequencies [d/2] (radians per position, fp32) under model.rope_scaling.

    frequency_D: the plain ones, base ** (-2i/d). sequence_length: tokens of every sequence that the
    model will see; dynamic and longrope depend on it, and transformers takes the longest sequence
    of a batch for it.

    linear  all / factor.
    llama3  (Llama 3.1), with w = 2 pi / frequency the wavelength in tokens and L the original
            sequence length: w < L / high: unchanged. w > L / low: / factor. Between:
            (1 - t) / factor + t times, t = (L / w - low) / (high - low).
    yarn    (Peng et al., arXiv 2309.00071): channels below the one that turns beta_fast times
            within L are unchanged, channels above the one that turns beta_slow times are / factor;
            a linear blend over the channels between the two, whose bounds are whole numbers.
    dynamic up to the original length unchanged. Beyond it those of another base, base * (factor *
            S / L - factor + 1) ** (d / (d - 2)), with S the sequence length.
    longrope (Ding et al., arXiv 2402.13753): / rope_short_factors up to the original length, and /
            rope_long_factors beyond it, channel by channel.

    Equals transformers' ROPE_INIT_FUNCTIONS. megatron-core's own scaling has L, low and high fixed
    at 8192, 1 and 4.
    """
    factor = model.rope_scaling_factor
    if model.rope_scaling == "linear":
        return frequency_D / factor
    if model.rope_scaling == "llama3":
        low = model.rope_low_frequency_factor
        high = model.rope_high_frequency_factor
        # L / w: full turns within the original length.
        turns_D = model.rope_original_sequence_length * frequency_D / (2 * math.pi)
        # 0 and 1 outside the blend: the two plain cases.
        unstretched_D = ((turns_D - low) / (high - low)).clamp(0.0, 1.0)
        return frequency_D * ((1 - unstretched_D) / factor + unstretched_D)
    if model.rope_scaling == "yarn":
        stretched_D = _yarn_share(len(frequency_D), model).to(frequency_D)
        return frequency_D * (stretched_D / factor + 1 - stretched_D)
    beyond = sequence_length > model.rope_original_sequence_length
    if model.rope_scaling == "longrope":
        divisors = model.rope_long_factors if beyond else model.rope_short_factors
        return frequency_D / torch.tensor(divisors).to(frequency_D)
    if model.rope_scaling == "dynamic" and beyond:
        size = 2 * len(frequency_D)
        longer = sequence_length / model.rope_original_sequence_length
        stretch = factor * longer - factor + 1
        base = model.rope_base * stretch ** (size / (size - 2))
        return 1.0 / base ** (torch.arange(0, size, 2).to(frequency_D) / size)
    return frequency_D


def _yarn_share(channels: int, model: ModelConfig) -> torch.Tensor:
    """How far each of d/2 channels is stretched, 0 to 1, fp32 [d/2]."""

    def channel(turns: float) -> float:
        """Where a rotation makes `turns` full turns within the original length."""
        length = model.rope_original_sequence_length
        return channels * math.log(length / (turns * 2 * math.pi)) / math.log(model.rope_base)

    first = max(math.floor(channel(model.rope_beta_fast)), 0)
    last: float = min(math.ceil(channel(model.rope_beta_slow)), 2 * channels - 1)
    if last == first:
        last += 0.001  # as in the published code: a step instead of a division by zero
    place_D = torch.arange(channels, dtype=torch.float32)
    return ((place_D - first) / (last - first)).clamp(0.0, 1.0)


def attention_scale(model: ModelConfig, *, stretched: bool = True) -> float | None:
    """Factor of query-key products before softmax; None = 1 / sqrt(head size).

    YaRN and LongRoPE multiply rotated queries and rotated keys by rope_attention_factor each, which
    is this factor of their products. stretched=False: of a layer that rope_scaling leaves alone.
    """
    sharper = stretched and model.rope_scaling in ROPE_WITH_ATTENTION_FACTOR
    if not sharper and not model.attention_scale_size:
        return None
    head_size = model.head_size or model.hidden_size // model.attention_heads
    factor = 1.0
    if sharper:
        factor = model.rope_attention_factor or _published_attention_factor(model)
    return factor**2 / math.sqrt(model.attention_scale_size or head_size)


def _published_attention_factor(model: ModelConfig) -> float:
    """What the papers of YaRN and LongRoPE multiply rotated queries, and rotated keys, by."""
    growth = math.log(model.rope_scaling_factor)
    if model.rope_scaling == "yarn":
        return 0.1 * growth + 1
    return math.sqrt(1 + growth / math.log(model.rope_original_sequence_length))


def unscale_layers_without_rope(chunk: Any, model: ModelConfig) -> None:
    """Take rope_attention_factor, which belongs to rotated queries and keys, out of the
    torch-native layers of `chunk`, a GPTModel, that rotate none.
    """
    for layer in chunk.decoder.layers:
        if layer.layer_number - 1 in model.layers_without_rope:
            layer.self_attention.core_attention.scale = attention_scale(model, stretched=False)


def turn_windowed_layers(chunk: Any, model: ModelConfig) -> None:
    """Turn queries and keys of the torch-native layers of `chunk`, a GPTModel, that have a sliding
    window by model.rope_base_windowed, which model.rope_scaling leaves alone.

    The model computes the angles of its other layers once and gives them to every layer; a hook
    before attention exchanges them, so that the fused passes of fused_layers.py get the right ones
    too.
    """
    rope, config = chunk.rotary_pos_emb, chunk.config
    own = RotaryEmbedding(
        2 * len(rope.inv_freq),
        rotary_percent=1.0,
        rotary_base=model.rope_base_windowed,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=rope.cp_group,
    )
    exchange = partial(_with_own_angles, own, config.context_parallel_size)
    for layer in chunk.decoder.layers:
        attention = layer.self_attention
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer.layer_number
        ):
            attention.register_forward_pre_hook(exchange, with_kwargs=True)
            attention.core_attention.scale = attention_scale(model, stretched=False)


def _with_own_angles(
    own: RotaryEmbedding, context_ranks: int, _: nn.Module, arguments: tuple, named: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    angle_S11D = named.get("rotary_pos_emb")
    if angle_S11D is None:  # a layer without rotary embedding
        return arguments, named
    return arguments, named | {"rotary_pos_emb": own(len(angle_S11D) * context_ranks)}
