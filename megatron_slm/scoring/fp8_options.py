"""Settings of a scoring run whose reference computes in fp8, and what they need. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_slm.config.schema import DeviceConfig
from megatron_slm.scoring.windows import padded_lengths

if TYPE_CHECKING:
    from megatron_slm.scoring.options import ScoreOptions


def fp8_problems(options: ScoreOptions) -> list[str]:
    """What is wrong with the fp8 settings alone, one sentence each."""
    problems = []
    fp8 = options.device.fp8
    if fp8 != "none" and not options.fp8_model:
        problems.append(
            f"device.fp8: got {fp8} without fp8_model; fp8 losses move the selection: name a "
            "checkpoint of the model to be trained, and how much they move is measured first"
        )
    if options.fp8_model and fp8 == "none":
        problems.append(
            f"fp8_model: got {options.fp8_model!r} with device.fp8 none; it measures what fp8 "
            "changes: set device.fp8 to hybrid, or leave it out"
        )
    if not options.fp8_keep_fraction:
        problems.append("fp8_keep_fraction: got 0.0; expected above 0")
    return problems


def fp8_size_problems(options: ScoreOptions, window_tokens: int) -> list[str]:
    """fp8 products need multiples of 16 tokens, in every length that a batch may have."""
    parallel = options.parallel
    ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
    lengths = padded_lengths(window_tokens, options.document_policy, ranks)
    return [
        f"micro_batch_size: got {options.micro_batch_size} windows of {length} tokens over {ranks} "
        "processes; fp8 products need multiples of 16 tokens on each"
        for length in lengths
        if options.micro_batch_size * length % (16 * ranks)
    ]


def fp8_description(device: DeviceConfig) -> str:
    """Part of the store's identity: shards in fp8 and others never meet in one store."""
    if device.fp8 == "none":
        return ""
    return f", {device.fp8} fp8 products with {device.fp8_recipe} scaling"
