"""The rotary embedding of plain.py: queries and keys turned by their positions, channel by channel.

B sequences, S tokens, n heads, d head size.
"""

import dataclasses
import math

import torch
from torch import Tensor

from megatron_slm.config.schema import ModelConfig


def rotated(heads_BSnd: Tensor, model: ModelConfig, *, windowed: bool = False) -> Tensor:
    """Queries or keys of a sequence that begins at position 0, their first channels turned where
    the model has a rotary embedding. windowed: of a layer with a sliding window.
    """
    if model.position_embedding != "rope":
        return heads_BSnd
    if windowed and model.rope_base_windowed:
        model = dataclasses.replace(model, rope_base=model.rope_base_windowed, rope_scaling="none")
    size = int(heads_BSnd.shape[-1] * model.rope_fraction)
    x_BSnd, unturned_BSnd = heads_BSnd[..., :size], heads_BSnd[..., size:]
    frequency = frequencies(model, size, x_BSnd.shape[1])
    angle = torch.outer(torch.arange(x_BSnd.shape[1], dtype=torch.float32), torch.tensor(frequency))
    angle = torch.cat([angle, angle], dim=-1)[None, :, None]
    first, second = x_BSnd.chunk(2, dim=-1)
    turned = x_BSnd * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()
    return torch.cat([turned * _attention_factor(model), unturned_BSnd], dim=-1)


def frequencies(model: ModelConfig, size: int, length: int) -> list[float]:
    """Radians per position of each two of `size` channels, for sequences of `length` tokens."""
    base = model.rope_base
    beyond = length > model.rope_original_sequence_length
    if model.rope_scaling == "dynamic" and beyond:
        longer = length / model.rope_original_sequence_length
        factor = model.rope_scaling_factor
        base *= (factor * longer - (factor - 1)) ** (size / (size - 2))
    found = [stretched(base ** (-channel / size), model) for channel in range(0, size, 2)]
    if model.rope_scaling == "longrope":
        divisors = model.rope_long_factors if beyond else model.rope_short_factors
        return [frequency / divisor for frequency, divisor in zip(found, divisors, strict=True)]
    return found


def _attention_factor(model: ModelConfig) -> float:
    """Of queries, and of keys."""
    factor, length = model.rope_scaling_factor, model.rope_original_sequence_length
    if model.rope_scaling == "yarn":
        return model.rope_attention_factor or 0.1 * math.log(factor) + 1
    if model.rope_scaling == "longrope":
        return model.rope_attention_factor or math.sqrt(1 + math.log(factor) / math.log(length))
    return 1.0


def stretched(frequency: float, model: ModelConfig) -> float:
    """A plain frequency (radians per position) under a scaling that the length of the sequence does
    not matter to."""
    if model.rope_scaling in ("none", "dynamic", "longrope"):
        return frequency
    if model.rope_scaling == "linear":
        return frequency / model.rope_scaling_factor
    if model.rope_scaling == "yarn":
        return _stretched_by_yarn(frequency, model)
    wavelength_tokens = 2 * math.pi / frequency
    length = model.rope_original_sequence_length
    if wavelength_tokens < length / model.rope_high_frequency_factor:
        return frequency
    if wavelength_tokens > length / model.rope_low_frequency_factor:
        return frequency / model.rope_scaling_factor
    kept = (length / wavelength_tokens - model.rope_low_frequency_factor) / (
        model.rope_high_frequency_factor - model.rope_low_frequency_factor
    )
    return (1 - kept) * frequency / model.rope_scaling_factor + kept * frequency


def _stretched_by_yarn(frequency: float, model: ModelConfig) -> float:
    """Each pair of channels by its number, 0 for the fastest."""
    pairs = (model.head_size or model.hidden_size // model.attention_heads) / 2

    def number(frequency: float) -> float:
        return -math.log(frequency) / math.log(model.rope_base) * pairs

    once = 2 * math.pi / model.rope_original_sequence_length
    first = max(0, math.floor(number(once * model.rope_beta_fast)))
    last = min(2 * pairs - 1, math.ceil(number(once * model.rope_beta_slow)))
    share = min(1.0, max(0.0, (round(number(frequency)) - first) / (last - first or 0.001)))
    return frequency * (share / model.rope_scaling_factor + 1 - share)
