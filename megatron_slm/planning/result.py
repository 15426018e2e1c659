"""The whole plan of a job in one object, and as JSON."""

from dataclasses import asdict, dataclass, fields

from megatron_slm.config.schema import Config
from megatron_slm.planning.communication import Traffic, traffic
from megatron_slm.planning.duration import Duration, bubble_fraction, duration
from megatron_slm.planning.head import HeadMemory, head_memory
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import RankMemory, fullest_stage, rank_memory, usable_bytes
from megatron_slm.planning.parameters import (
    Parameters,
    active_parameters,
    model_parameters,
    stage_parameters,
)
from megatron_slm.planning.propose import Proposal, propose
from megatron_slm.planning.work import Scoring, Work, scoring, work


@dataclass(frozen=True)
class Plan:
    """Every number of a job.

    Bytes and counts are of one rank of the stage named, FLOPs of one token.
    """

    job: Job
    parameters: Parameters
    stages: list[Parameters]
    memory: list[RankMemory]
    """One per pipeline stage."""
    fullest_stage: int
    head: HeadMemory
    work: Work
    traffic: list[Traffic]
    """Each kind at the stage where it is most."""
    bubble_fraction: float
    duration: Duration
    scoring: Scoring | None
    checkpoint_bytes: int
    proposals: list[Proposal]

    @property
    def usable_bytes(self) -> float:
        return usable_bytes(self.job)

    @property
    def fits(self) -> bool:
        return self.memory[self.fullest_stage].total <= self.usable_bytes


def make_plan(job: Job, proposals: int = 5) -> Plan:
    """The plan of a job that config.check accepts, with at most `proposals` other layouts."""
    stages = range(job.config.parallel.pipeline)
    memory = [rank_memory(job, stage) for stage in stages]
    return Plan(
        job=job,
        parameters=model_parameters(job),
        stages=[stage_parameters(job, stage) for stage in stages],
        memory=memory,
        fullest_stage=fullest_stage(job)[0],
        head=head_memory(job),
        work=work(job),
        traffic=busiest_traffic(job),
        bubble_fraction=bubble_fraction(job),
        duration=duration(job),
        scoring=scoring(job),
        checkpoint_bytes=checkpoint_bytes(job),
        proposals=propose(job, proposals) if proposals else [],
    )


def busiest_traffic(job: Job) -> list[Traffic]:
    """Every kind of communication once, at the stage that sends the most of it."""
    busiest: dict[tuple[str, str], Traffic] = {}
    for stage in range(job.config.parallel.pipeline):
        for each in traffic(job, stage):
            key = (each.role, each.name)
            if key not in busiest or busiest[key].sent_bytes < each.sent_bytes:
                busiest[key] = each
    return list(busiest.values())


def checkpoint_bytes(job: Job, *, with_optimizer: bool | None = None) -> int:
    """One checkpoint without its metadata.

    It holds the weights; with the optimizer also two fp32 moments and, under bf16, fp32 weights.
    """
    count = model_parameters(job).total
    low = job.config.device.precision != "fp32"
    if with_optimizer is None:
        with_optimizer = job.config.checkpoint.save_optimizer
    if not with_optimizer:
        return count * job.weight_bytes
    return count * (job.weight_bytes + (12 if low else 8))


def checkpoints_on_disk(config: Config, steps: int) -> int:
    """Checkpoints in the run folder at most.

    These are the newest, one for good every so often, the best, and one that is being written.
    """
    settings = config.checkpoint
    saved = -(-steps // settings.interval_steps) if settings.interval_steps else 1
    kept = saved if settings.keep_last == 0 else min(saved, settings.keep_last)
    for_good = steps // settings.keep_every_steps if settings.keep_every_steps else 0
    return min(saved, kept + for_good + settings.keep_best) + (1 if saved > kept else 0)


def as_json(plan: Plan) -> dict:
    """Plain values; the configuration itself is left out, the layout is in."""
    job = plan.job
    values = {
        field.name: _plain(getattr(plan, field.name))
        for field in fields(Plan)
        if field.name not in ("job", "proposals")
    }
    values["job"] = {
        "gpu": asdict(job.gpu),
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node,
        "efficiency": job.efficiency.training,
        "forward_efficiency": job.efficiency.forward,
        "layout": asdict(job.config.parallel) | {"data": job.data_parallel},
        "micro_batches": job.micro_batches,
        "step_tokens": job.step_tokens,
        "steps": job.steps,
        "corpus_tokens": job.corpus_tokens,
        "epochs": job.epochs,
        "trained_fraction": job.trained_fraction,
        "vocabulary_size": job.vocabulary_size,
    }
    values |= {"fits": plan.fits, "usable_bytes": plan.usable_bytes}
    values["memory"] = [asdict(memory) | {"total": memory.total} for memory in plan.memory]
    values["parameters"] |= {"total": plan.parameters.total, "active": active_parameters(job)}
    values["duration"]["step_seconds"] = plan.duration.step_seconds
    values["work"]["executed"] = plan.work.executed
    values["proposals"] = [
        {
            "overrides": each.overrides,
            "bytes": each.memory.total,
            "tokens_per_second": each.duration.tokens_per_second,
            "gpu_hours": each.duration.gpu_hours,
        }
        for each in plan.proposals
    ]
    return values


def _plain(value):
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
