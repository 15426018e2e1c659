"""Tokens per second, step time, model FLOPs and MFU, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_slm.config.schema import ModelConfig

# Dense peak of one device in FLOP/s, from the vendors' data sheets (no sparsity). fp32 = without TF32, torch's default.
_PEAK_FLOPS_PER_SECOND = {
    "B200": {"bf16": 2250e12, "fp32": 75e12},
    "GH200": {"bf16": 989e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "H20": {"bf16": 148e12, "fp32": 44e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "A800": {"bf16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
}


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations (a multiply and an add are two) for one token of one forward pass."""

    attention_projections: int
    attention_core: int
    feed_forward: int
    head: int

    @property
    def forward(self) -> int:
        return self.attention_projections + self.attention_core + self.feed_forward + self.head

    @property
    def training(self) -> int:
        """Forward plus backward (gradients of inputs and of weights: twice the forward). Recomputation is not counted."""
        return 3 * self.forward


def model_flops_per_token(model: ModelConfig, sequence_length: int, vocabulary_size: int) -> FlopsPerToken:
    """Matrix-multiply FLOPs of the decoder, per token; a [1, m] x [m, n] product is 2mn.

    With H = hidden, L = layers, a = query heads, g = key/value heads, d = head size, F = feed-forward, S = sequence, V = vocabulary:
      projections  L * 2H(a + 2g)d + L * 2adH      queries, keys and values; output
      core         L * 4ad(S + 1)/2                q·k and p·v against the (S + 1)/2 positions a causal mask shows on average
      feed-forward L * 6HF                         gate, up and down of SwiGLU
      head         2HV                             the embedding is a lookup and costs none
    """
    head_size = model.head_size or model.hidden_size // model.attention_heads
    query_groups = model.query_groups or model.attention_heads
    query_width = model.attention_heads * head_size
    return FlopsPerToken(
        attention_projections=model.layers * 2 * model.hidden_size * (2 * query_width + 2 * query_groups * head_size),
        attention_core=model.layers * 2 * query_width * (sequence_length + 1),
        feed_forward=model.layers * 6 * model.hidden_size * model.ffn_hidden_size,
        head=2 * model.hidden_size * vocabulary_size,
    )


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """The data-sheet peak of a device, e.g. torch.cuda.get_device_name(); None where none is known (any CPU)."""
    normalized = device_name.replace("-", " ").lower()
    for name, peaks in _PEAK_FLOPS_PER_SECOND.items():
        if all(word in normalized for word in name.lower().split()):
            return peaks.get(precision)
    return None


class Throughput:
    """Times the steps of one log interval.

    `with throughput.waiting_for_data():` around fetching a batch, `with throughput.paused():` around validation and
    checkpoints, `step_done(tokens)` after each optimizer step with the tokens of the global batch, `interval()` when logging:
    after `Metrics.reduce`, which waits for the device; otherwise a GPU's queued work is not in the time.
    """

    def __init__(self, *, total_tokens: int, flops_per_token: float, peak_flops_per_second: float | None = None,
                 world_size: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        """peak_flops_per_second: one device's stated peak; None = no MFU is reported."""
        self._total_tokens = total_tokens
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second * world_size if peak_flops_per_second else None
        self._clock = clock
        self.start_interval()

    def start_interval(self) -> None:
        """Forget what was measured, e.g. right before the first step so that start-up is not counted."""
        self._started_at = self._clock()
        self._paused_seconds = self._data_seconds = 0.0
        self._steps = self._tokens = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        started_at = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - started_at

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started_at = self._clock()
        try:
            yield
        finally:
            self._data_seconds += self._clock() - started_at

    def step_done(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def interval(self, tokens_processed: int) -> dict[str, float]:
        """The interval's figures; starts the next interval. Empty when no step was finished.

        throughput/step_seconds includes throughput/data_seconds (the wait for batches, per step).
        """
        seconds = self._clock() - self._started_at - self._paused_seconds
        steps, tokens, data_seconds = self._steps, self._tokens, self._data_seconds
        self.start_interval()
        if not steps or seconds <= 0:
            return {}
        tokens_per_second = tokens / seconds
        figures = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/step_seconds": seconds / steps,
            "throughput/data_seconds": data_seconds / steps,
            "throughput/model_flops_per_second": tokens_per_second * self._flops_per_token,
        }
        if tokens_per_second:
            figures["throughput/eta_seconds"] = max(self._total_tokens - tokens_processed, 0) / tokens_per_second
        if self._peak:
            figures["throughput/mfu_fraction"] = figures["throughput/model_flops_per_second"] / self._peak
        return figures
