"""Metrics of a run: record sums and counts (metrics.py), time steps (throughput.py), write them (sinks.py and friends)."""

from megatron_slm.monitoring.console import ConsoleSink
from megatron_slm.monitoring.metrics import Metrics
from megatron_slm.monitoring.sinks import JsonlSink, MultiSink, NullSink, Sink
from megatron_slm.monitoring.throughput import (
    Throughput,
    model_flops_per_token,
    peak_flops_per_second,
)
from megatron_slm.monitoring.wandb_sink import WandbSink, wandb_run_id

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "Metrics",
    "MultiSink",
    "NullSink",
    "Sink",
    "Throughput",
    "WandbSink",
    "model_flops_per_token",
    "peak_flops_per_second",
    "wandb_run_id",
]
