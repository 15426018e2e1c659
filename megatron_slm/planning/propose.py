"""Layouts that fit, the fastest first: all combinations that train accepts are computed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.planning.duration import Duration, duration
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import RankMemory, fullest_stage, usable_bytes

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
CHUNKS = (1, 2, 4, 5)
"""Model chunks of a pipeline rank. More would shorten the bubble further, at the price of more
messages, whose latency is not in the prediction."""
MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Proposal:
    """A job that fits, and its predicted performance."""

    job: Job
    memory: RankMemory
    duration: Duration

    @property
    def overrides(self) -> str:
        """The layout as options of train."""
        parallel, config = self.job.config.parallel, self.job.config
        experts = f"--parallel.expert {parallel.expert} " if config.model.experts else ""
        return (
            f"--parallel.tensor {parallel.tensor} "
            f"--parallel.sequence {str(parallel.sequence).lower()} "
            f"--parallel.pipeline {parallel.pipeline} "
            f"--parallel.virtual_pipeline {parallel.virtual_pipeline} "
            f"--parallel.context {parallel.context} {experts}"
            f"--parallel.distributed_optimizer {str(parallel.distributed_optimizer).lower()} "
            f"--model.recompute {config.model.recompute} "
            f"--data.micro_batch_size {config.data.micro_batch_size}"
        )


def fits(job: Job) -> bool:
    return fullest_stage(job)[1].total <= usable_bytes(job)


def propose(job: Job, count: int) -> list[Proposal]:
    """The `count` fastest layouts that fit.

    Of each (tensor, pipeline, context, expert) only the best recomputation, number of chunks and
    micro-batch. The global batch, the sequence length and the overlap settings stay. The micro-
    batch times the data-parallel size decides which tokens compete under the data_parallel scope: a
    proposal may change that.
    """
    best: dict[tuple[int, ...], Proposal] = {}
    rank = partial(_rank, configured_micro_batch=job.config.data.micro_batch_size)
    for candidate in candidates(job):
        memory = fullest_stage(candidate)[1]
        if memory.total > usable_bytes(candidate):
            continue
        parallel = candidate.config.parallel
        key = (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert)
        proposal = Proposal(candidate, memory, duration(candidate))
        if key not in best or rank(proposal) < rank(best[key]):
            best[key] = proposal
    return sorted(best.values(), key=rank)[:count]


@dataclass(frozen=True)
class Alternative:
    """A job near one that train refuses: what to change, and the fastest layout after that."""

    change: str
    """Options of plan and train beside the layout's; "" = the layout alone."""
    proposal: Proposal


def alternatives(job: Job) -> list[Alternative]:
    """What train would accept near a job that it refuses for its number of GPUs.

    First another layout of the same GPUs and batch. Where there is none (3 nodes and a batch that
    3 does not divide), the nearest batches above and below on these GPUs, and the nearest numbers
    of nodes with this batch. Empty when the configuration is wrong for another reason.
    """
    same = propose(job, 1)
    if same:
        return [Alternative("", same[0])]
    nearest = [_other_batch(job, step) for step in (-1, 1)]
    nearest += [_other_nodes(job, step) for step in (-1, 1)]
    return [alternative for alternative in nearest if alternative is not None]


def _other_batch(job: Job, step: int) -> Alternative | None:
    """The nearest larger (step 1) or smaller (-1) global batch that the number of GPUs divides."""
    batch = job.config.data.global_batch_size
    rounded = (-(-batch // job.ranks) if step > 0 else batch // job.ranks) * job.ranks
    if rounded in (0, batch):
        return None
    data = replace(job.config.data, global_batch_size=rounded)
    proposals = propose(replace(job, config=replace(job.config, data=data)), 1)
    return Alternative(f"--data.global_batch_size {rounded}", proposals[0]) if proposals else None


def _other_nodes(job: Job, step: int) -> Alternative | None:
    """The nearest larger (step 1) or smaller (-1) number of nodes, up to twice or down to one."""
    nodes = job.nodes + step
    while 1 <= nodes <= 2 * job.nodes:
        proposals = propose(replace(job, nodes=nodes), 1)
        if proposals:
            return Alternative(f"--nodes {nodes}", proposals[0])
        nodes += step
    return None


def candidates(job: Job) -> Iterator[Job]:
    """Every layout of the job's GPUs that train would accept.

    Tensor and expert groups stay inside a node, where the links are fast.
    """
    config, layers = job.config, job.config.model.layers
    tensor_sizes = _powers(job.gpus_per_node)
    context_sizes = _powers(min(16, job.ranks))
    expert_sizes = [1]
    if config.model.experts:
        expert_sizes = [each for each in tensor_sizes if config.model.experts % each == 0]
    micro_batches = sorted({*MICRO_BATCHES, config.data.micro_batch_size})
    for tensor, pipeline, context in product(tensor_sizes, range(1, layers + 1), context_sizes):
        if layers % pipeline or job.ranks % (tensor * pipeline * context):
            continue
        replicas = job.ranks // (tensor * pipeline * context)
        chunk_counts = [1]
        if pipeline > 1:
            chunk_counts = [each for each in CHUNKS if layers % (pipeline * each) == 0]
        for chunks, micro_batch, recompute, expert in product(
            chunk_counts, micro_batches, RECOMPUTE, expert_sizes
        ):
            if config.data.global_batch_size % (replicas * micro_batch):
                continue
            parallel = replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=chunks,
                context=context,
                expert=expert,
                sequence=tensor > 1,
                distributed_optimizer=True,
            )
            candidate = _with_layout(job, parallel, recompute, micro_batch)
            if _accepted(candidate):
                yield candidate


def _with_layout(
    job: Job, parallel: ParallelConfig, recompute: Recompute, micro_batch_size: int
) -> Job:
    config = replace(
        job.config,
        parallel=parallel,
        model=replace(job.config.model, recompute=recompute),
        data=replace(job.config.data, micro_batch_size=micro_batch_size),
    )
    return replace(job, config=config)


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def _accepted(job: Job) -> bool:
    try:
        check_config(job.config, job.ranks)
    except ConfigError:
        return False
    return True


def _rank(proposal: Proposal, configured_micro_batch: int) -> tuple[int, float, int]:
    """Fastest first; within half a percent of each other, the micro-batch nearest to the configured
    one, then free memory.
    """
    away = abs(math.log2(proposal.job.config.data.micro_batch_size / configured_micro_batch))
    return (
        -round(math.log(proposal.duration.tokens_per_second) / 0.005),
        away,
        proposal.memory.total,
    )
