"""How long a step and a run take, at a stated efficiency. Predicted, not measured.

A rank computes at `efficiency` x peak. Tensor, context and (plain 1F1B) pipeline communication
waits in line; gradient reduction and weight gathering are hidden behind one micro-batch's backward
and forward as far as they fit, when the overlap settings are on.
"""

from dataclasses import dataclass

from megatron_slm.planning.communication import Traffic, traffic
from megatron_slm.planning.flops import FlopsPerToken
from megatron_slm.planning.job import Job
from megatron_slm.planning.parameters import stage_parameters
from megatron_slm.planning.work import Work, forward_flops, work

OPTIMIZER_BYTES = 34
"""Memory traffic of one parameter's update: gradient norm, clipping, AdamW on fp32 weight and
moments, the cast to bf16."""


@dataclass(frozen=True)
class Duration:
    """Seconds of one optimizer step, and what follows from them."""

    compute_seconds: float
    """Micro-batches of the slowest stage."""
    communication_seconds: float
    """Tensor, context and pipeline communication in line with it."""
    bubble_seconds: float
    """Filling and draining the pipeline."""
    data_parallel_seconds: float
    """What overlap does not hide."""
    selection_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    model_flops_utilization: float
    run_seconds: float
    gpu_hours: float

    @property
    def step_seconds(self) -> float:
        return (
            self.compute_seconds
            + self.communication_seconds
            + self.bubble_seconds
            + self.data_parallel_seconds
            + self.selection_seconds
            + self.optimizer_seconds
        )


def bubble_fraction(job: Job) -> float:
    """(pp - 1) / (v · micro-batches): idle time over the time without a bubble, for equal stages."""
    parallel = job.config.parallel
    return (parallel.pipeline - 1) / (parallel.virtual_pipeline * job.micro_batches)


def duration(job: Job) -> Duration:
    """The prediction.

    With stages of different length the longest one sets the pace: M · longest + (sum of the others)
    / v.
    """
    parallel, micro_batches = job.config.parallel, job.micro_batches
    per_token = work(job)
    by_stage = [traffic(job, stage) for stage in range(parallel.pipeline)]
    compute = [stage_seconds(job, per_token, stage) for stage in range(parallel.pipeline)]
    in_line = [
        sum(each.seconds for each in found if _in_line(each)) / micro_batches for found in by_stage
    ]
    lengths = [a + b for a, b in zip(compute, in_line, strict=True)]
    slowest = max(range(len(lengths)), key=lambda stage: lengths[stage])
    bubble = (sum(lengths) - lengths[slowest]) / parallel.virtual_pipeline
    data = max(_exposed(found, seconds) for found, seconds in zip(by_stage, compute, strict=True))
    selection = max(
        sum(each.seconds for each in found if each.role == "selection") for found in by_stage
    )
    optimizer = max(optimizer_seconds(job, stage) for stage in range(parallel.pipeline))
    step = micro_batches * lengths[slowest] + bubble + data + selection + optimizer
    tokens_per_second = job.step_tokens / step
    peak = job.gpu.peak_flops_per_second(job.config.device.precision)
    return Duration(
        compute_seconds=micro_batches * compute[slowest],
        communication_seconds=micro_batches * in_line[slowest],
        bubble_seconds=bubble,
        data_parallel_seconds=data,
        selection_seconds=selection,
        optimizer_seconds=optimizer,
        tokens_per_second=tokens_per_second,
        model_flops_utilization=tokens_per_second * per_token.model / (peak * job.ranks),
        run_seconds=step * job.steps,
        gpu_hours=step * job.steps * job.ranks / 3600,
    )


def stage_seconds(job: Job, per_token: Work, stage: int) -> float:
    """Computing one micro-batch, forward and backward, on one rank of a stage."""
    parallel = job.config.parallel
    stages = parallel.pipeline
    # With experts this takes an even load: a micro-batch lasts as long as the busiest expert's
    # rank.
    flops = (per_token.layers + per_token.recomputed) / stages
    flops += (
        _forward_share(job, forward_flops(job, job.config.model), stage)
        if job.scores_before_backward
        else 0
    )
    flops += (
        _forward_share(job, forward_flops(job, job.reference_model), stage)
        if job.online_reference
        else 0
    )
    flops += per_token.head if stage == stages - 1 else 0
    return (
        job.rank_tokens
        * flops
        / parallel.tensor
        / (job.gpu.peak_flops_per_second(job.config.device.precision) * job.efficiency)
    )


def _forward_share(job: Job, forward: FlopsPerToken, stage: int) -> float:
    """What a stage does of a forward pass."""
    last = stage == job.config.parallel.pipeline - 1
    return (forward.forward - forward.head) / job.config.parallel.pipeline + (
        forward.head if last else 0
    )


def optimizer_seconds(job: Job, stage: int) -> float:
    """AdamW moves bytes and computes little."""
    held = stage_parameters(job, stage)
    spread = job.config.parallel.distributed_optimizer
    count = held.dense / (
        job.data_parallel * job.config.parallel.context if spread else 1
    ) + held.experts / (job.expert_data_parallel if spread else 1)
    return count * OPTIMIZER_BYTES / job.gpu.memory_bytes_per_second


def _in_line(each: Traffic) -> bool:
    return each.role in ("tensor", "context", "experts", "pipeline") and not each.hidden_by_compute


def _exposed(found: list[Traffic], micro_batch_seconds: float) -> float:
    """Seconds of gradient and weight traffic that stick out: backward is two thirds of a
    micro-batch, forward one third.
    """
    exposed = 0.0
    for each in found:
        if each.role == "data":
            cover = (
                0.0
                if not each.hidden_by_compute
                else micro_batch_seconds * (2 / 3 if "gradients" in each.name else 1 / 3)
            )
            exposed += max(0.0, each.seconds - cover)
    return exposed
