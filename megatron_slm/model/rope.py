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
    return frequency_D
