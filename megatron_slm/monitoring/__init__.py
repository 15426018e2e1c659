"""Metrics of a run: record sums and counts (metrics.py), time steps (throughput.py), write them
(sinks.py and friends).

loss_spikes.py is the alarm for a loss that jumps; run_status.py records in one small file whether a
run is running, done, stopped or failed; it needs no torch.
"""

from importlib import import_module

MODULES = {
    "ConsoleSink": "console",
    "LossSpikes": "loss_spikes",
    "Metrics": "metrics",
    "JsonlSink": "sinks",
    "MultiSink": "sinks",
    "NullSink": "sinks",
    "Sink": "sinks",
    "Throughput": "throughput",
    "model_flops_per_token": "throughput",
    "peak_flops_per_second": "throughput",
    "WandbSink": "wandb_sink",
    "wandb_run_id": "wandb_sink",
}
"""Where each public name is defined."""

__all__ = list(MODULES)


def __getattr__(name: str):
    """A public name, loaded on first use: metrics.py needs torch, and run_status.py is read without
    it.
    """
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
