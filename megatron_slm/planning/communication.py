"""Bytes that each rank sends per step, by purpose and link.

Ring algorithms: an all-gather or reduce-scatter of M bytes over r ranks sends M(r - 1)/r from each,
an all-reduce twice that.

Ranks are placed as megatron-core places them: tensor innermost, then context, then data, pipeline
outermost. A group whose ranks fit in one node communicates over NVLink. A larger group's ring
enters and leaves each node once, over as many network ports as it has ranks there.

n tokens of a micro-batch on a rank, H hidden, w bytes of an activation, L layers of a stage, M
micro-batches of a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_slm.config.overlap import decide_overlap
from megatron_slm.planning.job import Job, head_size, query_groups
from megatron_slm.planning.parameters import stage_parameters
from megatron_slm.selection.populations import GATHER_MAX_TOKENS_ACCELERATOR

LINK_FRACTION = 0.8
"""Share of a link's data-sheet rate that large messages reach: an assumption."""
COUNTS_BYTES = 2 * 2048 * 8
"""One all-reduce of selection/threshold.py: two lists of 2048 counts, in 8 bytes each."""
Role = Literal["tensor", "context", "experts", "pipeline", "data", "selection"]


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank and step."""

    role: Role
    name: str
    link: str
    """NVLink, or network."""
    ranks: int
    sent_bytes: float
    seconds: float
    hidden_by_compute: bool
    """Whether it runs beside computation (overlap settings) as long as there is enough of it."""


@dataclass(frozen=True)
class _Group:
    """Ranks that exchange messages."""

    ranks: int
    stride: int
    """Distance between consecutive ranks of the group in the order of ranks."""


def traffic(job: Job, stage: int) -> list[Traffic]:
    """All communication of a rank of pipeline stage `stage`, without kinds that do not occur."""
    found = [
        *_tensor(job, stage),
        *_context(job),
        *_experts(job),
        *_pipeline(job, stage),
        *_data(job, stage),
        *_tied_embedding(job, stage),
        *_selection(job, stage),
    ]
    return [each for each in found if each.sent_bytes]


def link_of(job: Job, ranks: int, stride: int) -> tuple[str, float]:
    """(name, bytes/s of one rank) of a group of `ranks` ranks, `stride` apart."""
    if ranks * stride <= job.gpus_per_node:
        return "NVLink", job.gpu.nvlink_bytes_per_second * LINK_FRACTION
    ports = max(1, min(ranks, job.gpus_per_node // stride))
    rate = min(job.gpu.nvlink_bytes_per_second, ports * job.gpu.network_bytes_per_second)
    return "network", rate * LINK_FRACTION


def _traffic(
    job: Job, role: Role, name: str, group: _Group, sent_bytes: float, hidden: bool = False
) -> Traffic:
    link, rate = link_of(job, group.ranks, group.stride)
    return Traffic(role, name, link, group.ranks, sent_bytes, sent_bytes / rate, hidden)


def _tensor(job: Job, stage: int) -> Iterator[Traffic]:
    """Activations between tensor ranks.

    Per layer: an all-reduce after attention and after the feed-forward layer, and one of both input
    gradients in backward. Sequence parallelism has an all-gather and a reduce-scatter in the place
    of each all-reduce, and two more all-gathers for the weight gradients. The embedding has an
    all-reduce, or a reduce-scatter and in backward an all-gather. Norms over all heads of queries
    and of keys all-reduce 4 bytes per token each, once more in backward.
    """
    parallel, model = job.config.parallel, job.config.model
    ranks = parallel.tensor
    if ranks == 1:
        return
    message = job.rank_tokens * model.hidden_size * job.weight_bytes
    forwards = 1 + (model.recompute == "full") + job.scores_before_backward
    halves = 4 * forwards + 4 + (2 if parallel.sequence else 0)  # an all-reduce is two halves
    if model.experts:
        halves //= 2  # attention's alone; _experts has the rest
    total: float = message * job.stage_layers * halves
    if model.qk_norm and model.qk_norm_over == "all_heads":
        total += 4 * job.rank_tokens * job.stage_layers * 2 * 2 * (forwards + 1)
    if stage == 0:
        total += message * 2
    if stage == parallel.pipeline - 1:
        kept = job.trained_fraction
        halves_of_head = (1 + 2 * kept) if parallel.sequence else 2 * kept
        total += 8 * job.rank_tokens * ranks + message * halves_of_head
    if job.online_reference:
        total += _tensor_bytes_of_reference(job)
    operations = "all-gather, reduce-scatter" if parallel.sequence else "all-reduce"
    sent_bytes = total * (ranks - 1) / ranks * job.micro_batches
    yield _traffic(job, "tensor", f"{operations} of activations", _Group(ranks, 1), sent_bytes)


def _tensor_bytes_of_reference(job: Job) -> int:
    """Messages of an online reference's forward pass."""
    reference = job.reference_model
    message = job.rank_tokens * reference.hidden_size * job.weight_bytes
    halves = 2 if reference.experts else 4
    return message * reference.layers // job.config.parallel.pipeline * halves


def _context(job: Job) -> Iterator[Traffic]:
    """Keys and values of the whole sequence between context ranks.

    An all-gather in forward, a reduce-scatter of their gradients in backward, and the first once
    more where attention is recomputed. Transformer Engine passes the same bytes around a ring, and
    passes them again in backward.
    """
    parallel, model = job.config.parallel, job.config.model
    ranks = parallel.context
    if ranks == 1:
        return
    width = 2 * query_groups(model) * head_size(model)
    message = job.rank_tokens * width // parallel.tensor * job.weight_bytes
    forwards = 1 + (model.recompute != "none") + job.scores_before_backward
    passes = forwards + (2 if job.transformer_engine else 1)
    yield _traffic(
        job,
        "context",
        "all-gather, reduce-scatter of keys and values",
        _Group(ranks, parallel.tensor),
        message * (ranks - 1) * job.stage_layers * passes * job.micro_batches,
    )


def _experts(job: Job) -> Iterator[Traffic]:
    """Each token's row to its experts and back, in forward and in backward.

    Experts that are split over tensor ranks gather and reduce rows too.
    """
    parallel, model = job.config.parallel, job.config.model
    if not model.experts:
        return
    rows = job.rank_tokens // job.sequence_split * model.experts_per_token
    row_bytes = rows * model.hidden_size * job.weight_bytes
    runs = 2 + (model.recompute == "full") + job.scores_before_backward
    passes = 2 * runs * job.stage_layers * job.micro_batches
    between, inside = _Group(parallel.expert, job.expert_tensor), _Group(job.expert_tensor, 1)
    yield _traffic(
        job,
        "experts",
        "all-to-all of tokens",
        between,
        row_bytes * (between.ranks - 1) / between.ranks * passes,
    )
    yield _traffic(
        job,
        "experts",
        "all-gather, reduce-scatter inside experts",
        inside,
        row_bytes * (inside.ranks - 1) * passes,
    )


def _pipeline(job: Job, stage: int) -> Iterator[Traffic]:
    """Each chunk's output to the next stage and its input's gradient to the one before."""
    parallel = job.config.parallel
    if parallel.pipeline == 1:
        return
    width = job.config.model.hidden_size * job.weight_bytes
    message = job.rank_tokens * width // job.sequence_split
    chunks = parallel.virtual_pipeline
    forwards = chunks - (stage == parallel.pipeline - 1)
    backwards = chunks - (stage == 0)
    forwards *= 2 if job.scores_before_backward else 1
    stride = parallel.tensor * parallel.context * job.data_parallel
    yield _traffic(
        job,
        "pipeline",
        "point to point",
        _Group(parallel.pipeline, stride),
        message * (forwards + backwards) * job.micro_batches,
        hidden=chunks > 1,
    )


def _data(job: Job, stage: int) -> Iterator[Traffic]:
    """Gradients (fp32) once per step, and with the distributed optimizer the updated weights."""
    parallel = job.config.parallel
    held = stage_parameters(job, stage)
    dense = _Group(job.data_parallel * parallel.context, parallel.tensor)
    expert = _Group(job.expert_data_parallel, job.expert_tensor * parallel.expert)
    overlap = decide_overlap(job.config, on_gpu=job.fused, ranks=dense.ranks)
    for suffix, owners, count in (("", dense, held.dense), (" of experts", expert, held.experts)):
        sent = count * (owners.ranks - 1) / owners.ranks
        if parallel.distributed_optimizer:
            name = f"reduce-scatter of gradients{suffix}"
            yield _traffic(job, "data", name, owners, 4 * sent, overlap.grad_reduce)
            name = f"all-gather of weights{suffix}"
            weight_bytes = job.weight_bytes * sent
            yield _traffic(job, "data", name, owners, weight_bytes, overlap.param_gather)
        else:
            name = f"all-reduce of gradients{suffix}"
            yield _traffic(job, "data", name, owners, 8 * sent, overlap.grad_reduce)


def _tied_embedding(job: Job, stage: int) -> Iterator[Traffic]:
    """The first and the last stage have a copy of a tied embedding; their gradients are summed."""
    parallel, last = job.config.parallel, job.config.parallel.pipeline - 1
    if not job.config.model.tied_embeddings or last == 0 or stage not in (0, last):
        return
    copies = _Group(2, parallel.tensor * job.data_parallel * parallel.context * last)
    yield _traffic(
        job,
        "data",
        "all-reduce of the tied embedding's gradients",
        copies,
        4 * stage_parameters(job, 0).embedding,
    )


def _selection(job: Job, stage: int) -> Iterator[Traffic]:
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
    calls = 1 if selection.scope == "global_batch" else job.micro_batches
    tokens = job.rank_tokens * (job.micro_batches // calls)
    gathers = tokens * ranks <= GATHER_MAX_TOKENS_ACCELERATOR
    sent = 4 * tokens * (ranks - 1) if gathers else 3 * COUNTS_BYTES * (ranks - 1) / ranks
    yield _traffic(
        job,
        "selection",
        "all-gather of scores" if gathers else "3 all-reduces of counts",
        _Group(ranks, parallel.tensor),
        sent * calls * searches,
    )
