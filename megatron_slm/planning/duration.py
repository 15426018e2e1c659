"""How long a step and a run take, at a measured or stated efficiency. Predicted, not measured.

A rank computes at `efficiency` x peak, forward passes without gradients at one of their own.
Tensor, context and (plain 1F1B) pipeline communication waits in line; gradient reduction and weight
gathering are hidden behind one micro-batch's backward and forward as far as they fit, when the
overlap settings are on.
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
    """(pp - 1) / (v · micro-batches): idle time over busy time, for equal stages."""
    parallel = job.config.parallel
    return (parallel.pipeline - 1) / (parallel.virtual_pipeline * job.micro_batches)


def duration(job: Job) -> Duration:
    """The prediction.

    With stages of different length the longest one sets the pace:
    M · longest + (sum of the others) / v.
    """
    parallel, micro_batches = job.config.parallel, job.micro_batches
    per_token = work(job)
    by_stage = [traffic(job, stage) for stage in range(parallel.pipeline)]
    compute = [stage_seconds(job, per_token, stage) for stage in range(parallel.pipeline)]
    in_line = [_in_line_seconds(found) / micro_batches for found in by_stage]
    lengths = [a + b for a, b in zip(compute, in_line, strict=True)]
    slowest = max(range(len(lengths)), key=lambda stage: lengths[stage])
    bubble = (sum(lengths) - lengths[slowest]) / parallel.virtual_pipeline
    data = max(map(_exposed_seconds, by_stage, compute))
    selection = max(map(_selection_seconds, by_stage))
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
    if stage == stages - 1:
        flops += per_token.head
    forward_only = 0.0
    if job.scores_before_backward:
        forward_only += _forward_share(job, forward_flops(job, job.config.model), stage)
    if job.online_reference:
        forward_only += _forward_share(job, forward_flops(job, job.reference_model), stage)
    peak_seconds = flops / job.efficiency.training + forward_only / job.efficiency.forward
    peak = job.gpu.peak_flops_per_second(job.config.device.precision)
    return job.rank_tokens * peak_seconds / parallel.tensor / peak


def _forward_share(job: Job, forward: FlopsPerToken, stage: int) -> float:
    """What a stage does of a forward pass."""
    stages = job.config.parallel.pipeline
    head = forward.head if stage == stages - 1 else 0
    return (forward.forward - forward.head) / stages + head


def optimizer_seconds(job: Job, stage: int) -> float:
    """The optimizer step is bound by the memory's bandwidth, not by computing."""
    held = stage_parameters(job, stage)
    owners = owners_of_experts = 1
    if job.config.parallel.distributed_optimizer:
        owners = job.data_parallel * job.config.parallel.context
        owners_of_experts = job.expert_data_parallel
    count = held.dense / owners + held.experts / owners_of_experts
    return count * OPTIMIZER_BYTES / job.gpu.memory_bytes_per_second


def _in_line_seconds(of_stage: list[Traffic]) -> float:
    """Seconds of communication that computation waits for."""
    roles = ("tensor", "context", "experts", "pipeline")
    return sum(
        each.seconds for each in of_stage if each.role in roles and not each.hidden_by_compute
    )


def _selection_seconds(of_stage: list[Traffic]) -> float:
    return sum(each.seconds for each in of_stage if each.role == "selection")


def _exposed_seconds(of_stage: list[Traffic], micro_batch_seconds: float) -> float:
    """Seconds of exposed (not overlapped) gradient and weight traffic.

    Backward, which gradients overlap with, is two thirds of a micro-batch; forward, which weights
    overlap with, one third.
    """
    exposed = 0.0
    for each in of_stage:
        if each.role == "data":
            share = 2 / 3 if "gradients" in each.name else 1 / 3
            overlapped = micro_batch_seconds * share if each.hidden_by_compute else 0.0
            exposed += max(0.0, each.seconds - overlapped)
    return exposed
