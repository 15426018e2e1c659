"""The share of a GPU's peak that this code reached while it computed, as measured once.

One H200, revision 8855768, TinyLlama-1.1B's shape, 8 sequences of 2048 tokens, bf16, 2026-11-26
(benchmarks/RESULTS.md, G6 and G9). What runs on a GPU has changed since and was not measured again.
Of a training step the optimizer's time as the planner counts it is taken off first. Other GPUs,
sizes and precisions are taken to reach the same share, which nobody has measured: larger hidden
sizes reach more (of 302 ms of the torch-native step's kernels 145 were products, at about two
thirds of the peak), small matrices less.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Executed FLOPs per second over the data sheet's peak, by kind of pass."""

    training: float
    """Forward and backward."""
    forward: float
    """A pass without gradients: scoring, an online reference, losses before a choice."""


TORCH_NATIVE = Efficiency(training=0.397, forward=0.444)
"""285.7 ms a step (MFU 39.2 %); scoring 194,800 tokens/s."""
TRANSFORMER_ENGINE = Efficiency(training=0.460, forward=0.486)
"""247.8 ms a step (MFU 45.2 %); scoring 213,000 tokens/s. Version 2.11."""
