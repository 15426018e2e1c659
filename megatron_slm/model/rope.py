"""Rotary embedding stretched to sequences longer than a model was first trained on."""

import math

import torch

from megatron_slm.config.schema import ModelConfig


def scaled_frequencies(frequency_D: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Rotary frequencies [d/2] (radians per position, fp32) under model.rope_scaling.

    frequency_D: the plain ones, base ** (-2i/d).

    linear  all / factor.
    llama3  (Llama 3.1), with w = 2 pi / frequency the wavelength in tokens and L the original
            sequence length: w < L / high: unchanged. w > L / low: / factor. Between:
            (1 - t) / factor + t times, t = (L / w - low) / (high - low).
    yarn    (Peng et al., arXiv 2309.00071): channels below the one that turns beta_fast times
            within L are unchanged, channels above the one that turns beta_slow times are / factor;
            a linear blend over the channels between the two, whose bounds are whole numbers.

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


def attention_scale(model: ModelConfig) -> float | None:
    """Factor of query-key products before softmax; None = 1 / sqrt(head size).

    YaRN multiplies rotated queries and rotated keys by rope_attention_factor each, which is this
    factor of their products.
    """
    if model.rope_scaling != "yarn":
        return None
    size = model.head_size or model.hidden_size // model.attention_heads
    factor = model.rope_attention_factor or 0.1 * math.log(model.rope_scaling_factor) + 1
    return factor**2 / math.sqrt(size)
