"""Layouts that fit, the fastest first: every combination this framework would accept is computed and ranked."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from megatron_slm.config.check import check
from megatron_slm.config.load import ConfigError
from megatron_slm.planning.duration import Duration, duration
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import RankMemory, fullest_stage, usable_bytes

RECOMPUTE = ("none", "selective", "full")
CHUNKS = (1, 2, 4, 5)
"""Of a pipeline rank. More would shorten the bubble further, by messages whose start is not in the prediction."""
MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Proposal:
    """A job that fits, and what it is predicted to do."""

    job: Job
    memory: RankMemory
    duration: Duration

    @property
    def overrides(self) -> str:
        """The layout as options of train."""
        parallel, config = self.job.config.parallel, self.job.config
        experts = f"--parallel.expert {parallel.expert} " if config.model.experts else ""
        return (
            f"--parallel.tensor {parallel.tensor} --parallel.sequence {str(parallel.sequence).lower()} --parallel.pipeline {parallel.pipeline} "
            f"--parallel.virtual_pipeline {parallel.virtual_pipeline} --parallel.context {parallel.context} {experts}"
            f"--parallel.distributed_optimizer {str(parallel.distributed_optimizer).lower()} --model.recompute {config.model.recompute} "
            f"--data.micro_batch_size {config.data.micro_batch_size}"
        )


def fits(job: Job) -> bool:
    return fullest_stage(job)[1].total <= usable_bytes(job)


def propose(job: Job, count: int) -> list[Proposal]:
    """The `count` fastest layouts that fit, the best recomputation, chunks and micro-batch of each (tensor, pipeline, context, expert) only.

    The global batch, the sequence length and the overlap settings stay. The micro-batch times the data-parallel size decides which tokens
    compete under the data_parallel scope: a proposal may change that.
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


def candidates(job: Job) -> Iterator[Job]:
    """Every layout of the job's GPUs that train would accept. Tensor and expert groups stay inside a node, where the links are fast."""
    config = job.config
    for tensor, pipeline, context in product(
        _powers(job.gpus_per_node), range(1, config.model.layers + 1), _powers(min(16, job.ranks))
    ):
        if config.model.layers % pipeline or job.ranks % (tensor * pipeline * context):
            continue
        replicas = job.ranks // (tensor * pipeline * context)
        virtual = (
            [each for each in CHUNKS if config.model.layers % (pipeline * each) == 0]
            if pipeline > 1
            else [1]
        )
        experts = (
            [each for each in _powers(job.gpus_per_node) if config.model.experts % each == 0]
            if config.model.experts
            else [1]
        )
        sizes = {*MICRO_BATCHES, config.data.micro_batch_size}
        for chunks, micro_batch, recompute, expert in product(
            virtual, sorted(sizes), RECOMPUTE, experts
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
            candidate = replace(
                job,
                config=replace(
                    config,
                    parallel=parallel,
                    model=replace(config.model, recompute=recompute),
                    data=replace(config.data, micro_batch_size=micro_batch),
                ),
            )
            if _accepted(candidate):
                yield candidate


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def _accepted(job: Job) -> bool:
    try:
        check(job.config, job.ranks)
    except ConfigError:
        return False
    return True


def _rank(proposal: Proposal, configured_micro_batch: int) -> tuple:
    """Fastest first; among layouts within half a percent of each other, the micro-batch nearest to the configured one, then free memory."""
    away = abs(math.log2(proposal.job.config.data.micro_batch_size / configured_micro_batch))
    return (
        -round(math.log(proposal.duration.tokens_per_second) / 0.005),
        away,
        proposal.memory.total,
    )
