"""Tokens per second, step time, model FLOPs and MFU, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_slm.planning.flops import model_flops_per_token
from megatron_slm.planning.hardware import find_gpu

__all__ = ["Throughput", "model_flops_per_token", "peak_flops_per_second"]


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """The data-sheet peak of a device by its name, as torch.cuda.get_device_name() gives it.

    None where none is known (any CPU).
    """
    gpu = find_gpu(device_name)
    return gpu.peak_flops_per_second(precision) if gpu else None


class Throughput:
    """Times the steps of one log interval.

    `with throughput.waiting_for_data():` stands around fetching a batch,
    `with throughput.paused():` around validation and checkpoints, `step_done(tokens)` after each
    optimizer step with the tokens of the global batch, and `interval()` when logging: after
    `Metrics.reduce`, which waits for the device. Otherwise a GPU's queued work is not in the time.
    """

    def __init__(
        self,
        *,
        total_tokens: int,
        flops_per_token: float,
        peak_flops_per_second: float | None = None,
        world_size: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """peak_flops_per_second: one device's stated peak; None = no MFU is reported."""
        self._total_tokens = total_tokens
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second * world_size if peak_flops_per_second else None
        self._clock = clock
        self.start_interval()

    def start_interval(self) -> None:
        """Forget what was measured, as before the first step: start-up is not counted."""
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
        steps = self._steps
        data_seconds = self._data_seconds
        tokens = self._tokens
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
            figures["throughput/eta_seconds"] = (
                max(self._total_tokens - tokens_processed, 0) / tokens_per_second
            )
        if self._peak:
            figures["throughput/mfu_fraction"] = (
                figures["throughput/model_flops_per_second"] / self._peak
            )
        return figures
