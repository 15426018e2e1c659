"""Bytes each rank sends per step, by what for and over which link.

Ring algorithms: an all-gather or reduce-scatter of M bytes over r ranks sends M(r - 1)/r from each,
an all-reduce twice that.

Ranks are placed as megatron-core places them: tensor innermost, then context, then data, pipeline
outermost. A group whose ranks fit in one node talks over NVLink. A larger group's ring enters and
leaves each node once, over as many network ports as it has ranks there.

n tokens of a micro-batch on a rank, H hidden, w bytes of an activation, L layers of a stage, M
micro-batches of a step.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_slm.planning.job import Job, head_size, query_groups
from megatron_slm.planning.parameters import stage_parameters
from megatron_slm.selection.populations import GATHER_MAX_TOKENS_ACCELERATOR

LINK_FRACTION = 0.8
"""Share of a link's data-sheet rate that large messages reach: an assumption."""


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank and step."""

    role: Literal["tensor", "context", "experts", "pipeline", "data", "selection"]
    name: str
    link: str
    """NVLink, or network."""
    ranks: int
    sent_bytes: float
    seconds: float
    hidden_by_compute: bool
    """Whether it runs beside computation (overlap settings) as long as there is enough of it."""


def traffic(job: Job, stage: int) -> list[Traffic]:
    """All communication of a rank of pipeline stage `stage`; kinds that do not occur are left out."""
    found = [
        *_tensor(job, stage),
        *_context(job),
        *_experts(job),
        *_pipeline(job, stage),
        *_data(job, stage),
        *_selection(job, stage),
    ]
    return [each for each in found if each.sent_bytes]


def link_of(job: Job, ranks: int, stride: int) -> tuple[str, float]:
    """(name, bytes/s of one rank) of a group of `ranks` ranks, `stride` apart."""
    if ranks * stride <= job.gpus_per_node:
        return "NVLink", job.gpu.nvlink_bytes_per_second * LINK_FRACTION
    local = max(1, min(ranks, job.gpus_per_node // stride))
    return "network", min(
        job.gpu.nvlink_bytes_per_second, local * job.gpu.network_bytes_per_second
    ) * LINK_FRACTION


def _one(
    job: Job, role: str, name: str, ranks: int, stride: int, sent_bytes: float, hidden: bool = False
) -> Traffic:
    link, rate = link_of(job, ranks, stride)
    return Traffic(role, name, link, ranks, sent_bytes, sent_bytes / rate, hidden)


def _tensor(job: Job, stage: int):
    """Per layer: all-reduce after attention and after the feed-forward layer, and of both input
    gradients in backward. Sequence parallelism: an all-gather and a reduce-scatter in the place of
    each all-reduce, and two more all-gathers for the weight gradients.
    """
    parallel, hidden_size = job.config.parallel, job.config.model.hidden_size
    ranks = parallel.tensor
    if ranks == 1:
        return
    message = job.rank_tokens * hidden_size * job.weight_bytes
    again = 1 if job.config.model.recompute == "full" else 0
    forwards = 1 + again + (1 if job.scores_before_backward else 0)
    halves = 4 * forwards + 4 + (2 if parallel.sequence else 0)  # an all-reduce is two halves
    if job.config.model.experts:
        halves //= 2  # attention's alone; _experts has the rest
    total = message * job.stage_layers * halves
    if stage == 0:
        total += (
            message * 2
        )  # the embedding: an all-reduce, or a reduce-scatter and in backward an all-gather
    if stage == parallel.pipeline - 1:
        kept = job.trained_fraction
        total += 8 * job.rank_tokens * ranks + message * (
            (1 + 2 * kept) if parallel.sequence else 2 * kept
        )
    if job.online_reference:
        reference = job.reference_model
        total += (
            job.rank_tokens
            * reference.hidden_size
            * job.weight_bytes
            * reference.layers
            // parallel.pipeline
            * (2 if reference.experts else 4)
        )
    name = (
        "all-gather, reduce-scatter of activations"
        if parallel.sequence
        else "all-reduce of activations"
    )
    yield _one(job, "tensor", name, ranks, 1, total * (ranks - 1) / ranks * job.micro_batches)


def _context(job: Job):
    """Keys and values of the whole sequence: all-gather in forward, reduce-scatter of their
    gradients in backward, and once more where attention is recomputed. Transformer Engine passes
    the same bytes around a ring, and passes them again in backward.
    """
    parallel, model = job.config.parallel, job.config.model
    ranks = parallel.context
    if ranks == 1:
        return
    message = (
        job.rank_tokens
        * 2
        * query_groups(model)
        * head_size(model)
        // parallel.tensor
        * job.weight_bytes
    )
    forwards = 1 + (model.recompute != "none") + job.scores_before_backward
    passes = forwards + (2 if job.transformer_engine else 1)
    yield _one(
        job,
        "context",
        "all-gather, reduce-scatter of keys and values",
        ranks,
        parallel.tensor,
        message * (ranks - 1) * job.stage_layers * passes * job.micro_batches,
    )


def _experts(job: Job):
    """Each token's row to its experts and back, in forward and in backward.

    Experts that are split over tensor ranks gather and reduce rows too.
    """
    parallel, model = job.config.parallel, job.config.model
    if not model.experts:
        return
    rows = (
        job.rank_tokens
        // job.sequence_split
        * model.experts_per_token
        * model.hidden_size
        * job.weight_bytes
    )
    passes = (
        2
        * (2 + (model.recompute == "full") + job.scores_before_backward)
        * job.stage_layers
        * job.micro_batches
    )
    ranks, inside = parallel.expert, job.expert_tensor
    yield _one(
        job, "experts", "all-to-all of tokens", ranks, inside, rows * (ranks - 1) / ranks * passes
    )
    yield _one(
        job,
        "experts",
        "all-gather, reduce-scatter inside experts",
        inside,
        1,
        rows * (inside - 1) * passes,
    )


def _pipeline(job: Job, stage: int):
    """Each chunk's output to the next stage and its input's gradient to the one before."""
    parallel = job.config.parallel
    if parallel.pipeline == 1:
        return
    message = (
        job.rank_tokens * job.config.model.hidden_size * job.weight_bytes // job.sequence_split
    )
    virtual, last = parallel.virtual_pipeline, parallel.pipeline - 1
    forwards = virtual - (stage == last)
    backwards = virtual - (stage == 0)
    forwards *= 2 if job.scores_before_backward else 1
    stride = parallel.tensor * parallel.context * job.data_parallel
    yield _one(
        job,
        "pipeline",
        "point to point",
        parallel.pipeline,
        stride,
        message * (forwards + backwards) * job.micro_batches,
        hidden=virtual > 1,
    )


def _data(job: Job, stage: int):
    """Gradients (fp32) once per step, and with the distributed optimizer the updated weights.

    Tied copies of the embedding add theirs.
    """
    parallel = job.config.parallel
    ranks = job.data_parallel * parallel.context
    held = stage_parameters(job, stage)
    parts = [
        ("", ranks, parallel.tensor, held.dense),
        (
            " of experts",
            job.expert_data_parallel,
            job.expert_tensor * parallel.expert,
            held.experts,
        ),
    ]
    for suffix, owners, stride, count in parts:
        sent = count * (owners - 1) / owners
        if parallel.distributed_optimizer:
            yield _one(
                job,
                "data",
                "reduce-scatter of gradients" + suffix,
                owners,
                stride,
                4 * sent,
                parallel.overlap_grad_reduce,
            )
            yield _one(
                job,
                "data",
                "all-gather of weights" + suffix,
                owners,
                stride,
                job.weight_bytes * sent,
                parallel.overlap_param_gather,
            )
        else:
            yield _one(
                job,
                "data",
                "all-reduce of gradients" + suffix,
                owners,
                stride,
                8 * sent,
                parallel.overlap_grad_reduce,
            )
    if (
        job.config.model.tied_embeddings
        and parallel.pipeline > 1
        and stage in (0, parallel.pipeline - 1)
    ):
        rows = stage_parameters(job, 0).embedding
        yield _one(
            job,
            "data",
            "all-reduce of the tied embedding's gradients",
            2,
            parallel.tensor * ranks * (parallel.pipeline - 1),
            4 * rows,
        )


def _selection(job: Job, stage: int):
    """Scores of the competing tokens, or counts of their digits (selection/threshold.py).

    Waiting for the slowest rank is not in this.
    """
    selection, parallel = job.config.selection, job.config.parallel
    ranks = {
        "data_parallel": job.data_parallel * parallel.context,
        "global_batch": job.data_parallel * parallel.context,
        "micro_batch": parallel.context,
        "sequence": parallel.context,
    }.get(selection.scope, 1)
    searches = job.rules.scorer.choices if job.rules.scorer.uses_keep_fraction else 0
    if not searches or stage != parallel.pipeline - 1 or ranks == 1:
        return
    calls, tokens = (
        (1, job.rank_tokens * job.micro_batches)
        if selection.scope == "global_batch"
        else (job.micro_batches, job.rank_tokens)
    )
    gathers = tokens * ranks <= GATHER_MAX_TOKENS_ACCELERATOR
    sent = 4 * tokens * (ranks - 1) if gathers else 3 * 2 * 2048 * 8 * (ranks - 1) / ranks
    yield _one(
        job,
        "selection",
        "all-gather of scores" if gathers else "3 all-reduces of counts",
        ranks,
        parallel.tensor,
        sent * calls * searches,
    )
