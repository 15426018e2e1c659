"""A plan as tables of text: the terminal and docs/scale.md print the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import USABLE_FRACTION
from megatron_slm.planning.parameters import active_parameters
from megatron_slm.planning.propose import Proposal
from megatron_slm.planning.result import Plan, checkpoints_on_disk
from megatron_slm.planning.wording import (
    bytes_in_words,
    describe_data,
    describe_layout,
    describe_selection,
    flops_in_words,
    gib,
    in_words,
)

PARTS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer: main weights, moments",
    "activations": "activations kept for backward",
    "working": "backward of one layer",
    "head": "head",
    "reference": "online reference",
    "communication": "communication buffers",
    "context": "CUDA, NCCL (allowance)",
}


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def is_numeric(self, place: int) -> bool:
        """Whether a column reads better right-aligned."""
        return place > 0 and all(
            row[place][:1].isdigit() or row[place] in ("yes", "NO", "-") for row in self.rows
        )


def tables(plan: Plan) -> list[Table]:
    """All of a plan, in reading order."""
    found = [
        job_table(plan),
        memory_table(plan),
        work_table(plan),
        traffic_table(plan),
        time_table(plan),
        storage_table(plan),
    ]
    if plan.proposals:
        found.append(proposal_table(plan.proposals, plan.job))
    return found


def job_table(plan: Plan) -> Table:
    job, parameters = plan.job, plan.parameters
    data = job.config.data
    experts = f"experts {in_words(parameters.experts)}, " if parameters.experts else ""
    rows = [
        (
            "parameters",
            f"{parameters.total:,} (embedding {in_words(parameters.embedding)}, layers "
            f"{in_words(parameters.layers)}, {experts}head {in_words(parameters.head)})",
        ),
        ("GPUs", f"{job.ranks} {job.gpu.name}: {job.nodes} nodes of {job.gpus_per_node}"),
        ("layout", f"{describe_layout(job)}, data {job.data_parallel}"),
    ]
    if parameters.experts:
        model = job.config.model
        rows.append(
            (
                "a token meets",
                f"{active_parameters(job):,} parameters: {model.experts_per_token} of "
                f"{model.experts} experts",
            )
        )
    spread = job.config.parallel.distributed_optimizer
    rows += [
        ("recomputation", job.config.model.recompute),
        (
            "step",
            f"{data.global_batch_size} sequences of {data.sequence_length} = "
            f"{job.step_tokens:,} tokens; {job.micro_batches} micro-batches of "
            f"{data.micro_batch_size} per data-parallel rank",
        ),
        ("run", f"{job.steps:,} steps, {in_words(job.steps * job.step_tokens)} tokens"),
        ("data", describe_data(job)),
        ("selection", describe_selection(job)),
        (
            "tokens that compete",
            f"{job.competing_tokens:,}" if job.rules.scorer.uses_keep_fraction else "-",
        ),
        (
            "optimizer",
            f"AdamW, {'spread over the data-parallel ranks' if spread else 'whole on every rank'}",
        ),
    ]
    return Table("The job", ("", ""), rows)


def memory_table(plan: Plan) -> Table:
    """GiB per rank of the first, the fullest and the last pipeline stage."""
    last = len(plan.memory) - 1
    shown = sorted({0, plan.fullest_stage, last})
    stages = [f"stage {stage}" for stage in shown] if last else ["all ranks"]
    rows: list[tuple[str, ...]] = []
    for part, name in PARTS.items():
        if any(getattr(memory, part) for memory in plan.memory):
            rows.append((name, *(gib(getattr(plan.memory[stage], part)) for stage in shown)))
    totals = [plan.memory[stage].total for stage in shown]
    usable = f"usable: {USABLE_FRACTION:.0%} of {plan.job.gpu.memory_bytes / 1e9:.0f} GB"
    rows += [
        ("total", *map(gib, totals)),
        (usable, *[gib(plan.usable_bytes)] * len(shown)),
        ("fits", *("yes" if total <= plan.usable_bytes else "NO" for total in totals)),
    ]
    return Table(f"Memory (head: {plan.head.mode})", ("GiB per rank", *stages), rows)


def work_table(plan: Plan) -> Table:
    work, tokens = plan.work, plan.job.step_tokens
    parts = [
        ("model, as MFU counts it", work.model),
        ("executed", work.executed),
        ("  layers, forward and backward", work.layers),
        ("  recomputed in backward", work.recomputed),
        ("  head", work.head),
        ("  online reference", work.reference),
        ("  forward pass to choose first", work.choosing),
    ]
    return Table(
        "Work",
        ("", "FLOPs per token", "FLOPs per step"),
        [
            (name, flops_in_words(value), flops_in_words(value * tokens))
            for name, value in parts
            if value
        ],
    )


def traffic_table(plan: Plan) -> Table:
    rows = [
        (
            each.role,
            each.name,
            each.link,
            str(each.ranks),
            bytes_in_words(each.sent_bytes),
            f"{each.seconds * 1e3:,.1f}",
            "overlapped" if each.hidden_by_compute else "waits",
        )
        for each in plan.traffic
    ]
    return Table(
        "Communication per step, sent by one rank",
        ("", "", "link", "ranks", "sent", "ms", ""),
        rows or [("none", "", "", "", "", "", "")],
    )


def time_table(plan: Plan) -> Table:
    time, job = plan.duration, plan.job
    seconds = [
        ("computing", time.compute_seconds),
        ("tensor, context, expert, pipeline communication", time.communication_seconds),
        (f"pipeline bubble ((pp - 1) / (v m) = {plan.bubble_fraction:.3f})", time.bubble_seconds),
        ("data-parallel communication, not hidden", time.data_parallel_seconds),
        ("selection", time.selection_seconds),
        ("optimizer", time.optimizer_seconds),
        ("step", time.step_seconds),
    ]
    rows = [
        (name, f"{value:,.3f} s" if value >= 0.01 or not value else f"{value * 1e3:.2f} ms")
        for name, value in seconds
    ]
    rows += [
        ("tokens per second", f"{time.tokens_per_second:,.0f}"),
        ("tokens per second and GPU", f"{time.tokens_per_second / job.ranks:,.0f}"),
        ("model FLOPs utilisation (MFU)", f"{time.model_flops_utilization:.1%}"),
        ("run", f"{time.run_seconds / 3600:,.1f} hours, {time.gpu_hours:,.0f} GPU-hours"),
    ]
    measured = job.stated_efficiency is None
    source = "a share measured on one H200" if measured else "as --efficiency says"
    return Table(
        f"Time, predicted at {job.efficiency.training:.0%} of the peak "
        f"({job.gpu.peak_flops_per_second(job.config.device.precision) / 1e12:,.0f} TFLOP/s), "
        f"{source}",
        ("", ""),
        rows,
    )


def storage_table(plan: Plan) -> Table:
    count = checkpoints_on_disk(plan.job.config, plan.job.steps)
    rows = [
        ("one checkpoint", bytes_in_words(plan.checkpoint_bytes)),
        (f"checkpoints on disk, at most {count}", bytes_in_words(count * plan.checkpoint_bytes)),
    ]
    if plan.scoring:
        scoring = plan.scoring
        share = scoring.gpu_hours / plan.duration.gpu_hours
        rows += [
            (
                f"score store of {in_words(scoring.tokens)} corpus tokens, fp16",
                bytes_in_words(scoring.store_bytes),
            ),
            (
                "scoring the corpus once, before the run",
                f"{flops_in_words(scoring.flops_per_token)} FLOPs per token, "
                f"{scoring.gpu_hours:,.1f} GPU-hours ({share:.0%} of the run)",
            ),
        ]
    return Table("On disk, and scoring", ("", ""), rows)


def proposal_table(proposals: list[Proposal], job: Job) -> Table:
    """Layouts that fit, the fastest first."""
    selects, mixture = job.rules.scorer.uses_keep_fraction, bool(job.config.model.experts)
    rows = []
    for each in proposals:
        own, parallel = each.job.config, each.job.config.parallel
        chunks = f" x {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        rows.append(
            (
                str(parallel.tensor),
                f"{parallel.pipeline}{chunks}",
                str(parallel.context),
                *((str(parallel.expert),) if mixture else ()),
                str(each.job.data_parallel),
                own.model.recompute,
                str(own.data.micro_batch_size),
                gib(each.memory.total),
                in_words(each.duration.tokens_per_second),
                f"{each.duration.model_flops_utilization:.1%}",
                *((in_words(each.job.competing_tokens),) if selects else ()),
            )
        )
    headings = (
        "tp",
        "pp",
        "cp",
        *(("ep",) if mixture else ()),
        "dp",
        "recompute",
        "batch",
        "GiB",
        "tokens/s",
        "MFU",
        *(("compete",) if selects else ()),
    )
    return Table(
        "Layouts that fit, the fastest first (sequence parallelism where tp > 1, distributed "
        "optimizer)",
        headings,
        rows,
    )
