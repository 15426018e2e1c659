"""The metrics of a run in training: summed step by step, written interval by interval."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_slm.model.optimizer import loss_scale
from megatron_slm.model.router import summarise_routing
from megatron_slm.monitoring import Throughput
from megatron_slm.selection.alarms import selection_ended
from megatron_slm.selection.diagnostics import summarise
from megatron_slm.selection.metric_sums import MetricSums
from megatron_slm.training.run_parts import RunParts
from megatron_slm.training.step import StepReport


def count_step(run: RunParts, report: StepReport, *, of_use: bool) -> None:
    """Add a step's sums to the interval's.

    Those of a faulty step (not of_use) may not be finite and would hide the others.
    """
    run.skipped_steps += not report.updated
    if of_use:
        run.spike_data.step_done(report.measured)
    if of_use and report.selected_tokens is not None:
        run.metrics.add_all(report.measured)
        run.metrics.add_sum("tokens/selected", report.selected_tokens)


def step_metrics(run: RunParts, report: StepReport, learning_rate: float) -> dict[str, Any]:
    """What is known of every step without waiting for the device."""
    norm = {"optimizer/grad_norm": report.grad_norm} if report.updated else {}
    return {
        "tokens/processed": run.done.tokens,
        **norm,
        "optimizer/learning_rate": learning_rate,
    }


def log_interval(run: RunParts, of_step: dict[str, Any], throughput: Throughput) -> dict[str, Any]:
    """Write the interval's metrics, and the warnings computed from them; returns the line.

    of_step: the metrics of the interval's last step.
    """

    def summarised(reduced: MetricSums) -> dict[str, Any]:
        model = run.config.model
        return summarise(reduced) | summarise_routing(reduced, model.layers, model.experts)

    summary = run.metrics.reduce(run.groups.dp_cp, summarise=summarised)
    run.tokens_selected += int(summary.pop("tokens/selected", 0))
    record = {
        "kind": "train",
        "tokens/processed": run.done.tokens,
        "tokens/selected": run.tokens_selected,
        **summary,
        **of_step,
        **_loss_scaling(run),
        **throughput.interval(run.done.tokens),
        **run.slow_ranks.interval(),
    }
    run.reporter.log(record, run.step)
    selector = run.trainer.selector
    keep_fraction = selector.keep_fraction(run.done.tokens - run.length.step_tokens)
    alarms = run.reporter.emit_warnings(summary, keep_fraction, selector.scorer)
    if run.config.selection.end_when_overtaken and selector.ended_at_tokens is None:
        _end_selection(run, overtaken="reference_overtaken" in alarms)
    run.spike_data.end_interval(run.loss_spikes.look(summary, keep_fraction, run.step))
    return record


def _end_selection(run: RunParts, *, overtaken: bool) -> None:
    """End the selection if the model has overtaken its reference; every rank calls it.

    overtaken: known on the last pipeline stage. The other stages have to be told, because the
    passes of a step depend on what is selected.
    """
    answer = torch.tensor([overtaken], dtype=torch.int64, device=run.groups.device)
    dist.broadcast(answer, src=run.groups.world_size - 1)
    if answer.item():
        run.trainer.end_selection(run.done.tokens)
        run.reporter.message(selection_ended(run.step), "warning")


def _loss_scaling(run: RunParts) -> dict[str, float]:
    scale = loss_scale(run.trainer.optimizer)
    metrics: dict[str, float] = {}
    if scale is not None:
        metrics["optimizer/loss_scale"] = scale
    if scale is not None or run.skipped_steps:
        metrics["optimizer/skipped_steps"] = run.skipped_steps
    return metrics
