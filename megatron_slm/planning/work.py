"""Floating-point operations that are executed beside the model's own.

These are recomputation, the selective head and the reference.
"""

from dataclasses import dataclass

from megatron_slm.config.schema import ModelConfig
from megatron_slm.planning.flops import FlopsPerToken, model_flops_per_token
from megatron_slm.planning.head import head_memory, head_products
from megatron_slm.planning.job import Job


@dataclass(frozen=True)
class Work:
    """FLOPs per processed token."""

    model: int
    """Forward and backward of every token, plain training without recomputation: what MFU is
    measured against."""
    layers: int
    """Forward and backward of the transformer layers as executed."""
    recomputed: int
    """Forward again inside backward."""
    head: float
    """The head as executed: forward of all tokens, backward of the trained ones."""
    reference: int
    """Forward of an online reference in every step."""
    choosing: int
    """The model's forward pass before backward that scope global_batch needs."""

    @property
    def executed(self) -> float:
        return self.layers + self.recomputed + self.head + self.reference + self.choosing


def work(job: Job) -> Work:
    """The work of one token of this job."""
    forward = forward_flops(job, job.config.model)
    layers = forward.forward - forward.head
    recomputed = {"none": 0, "selective": forward.attention_core, "full": layers}[
        job.config.model.recompute
    ]
    return Work(
        model=forward.training,
        layers=3 * layers,
        recomputed=recomputed,
        head=forward.head * head_products(head_memory(job).mode, job.trained_fraction),
        reference=forward_flops(job, job.reference_model).forward if job.online_reference else 0,
        choosing=forward.forward if job.scores_before_backward else 0,
    )


def forward_flops(job: Job, model: ModelConfig) -> FlopsPerToken:
    return model_flops_per_token(model, job.config.data.sequence_length, job.vocabulary_size)


@dataclass(frozen=True)
class Scoring:
    """Scoring the corpus once with a reference, before the run."""

    flops_per_token: int
    tokens: int
    gpu_hours: float
    store_bytes: int


def scoring(job: Job) -> Scoring | None:
    """None when the run needs no stored scores.

    Windows do not overlap (the default of python -m megatron_slm.score), and scores are fp16.
    Half-overlapping windows cost twice as much.
    """
    if not job.config.selection.reference.scores:
        return None
    flops = forward_flops(job, job.reference_model).forward
    tokens = job.corpus_tokens or job.step_tokens * job.steps
    peak = job.gpu.peak_flops_per_second(job.config.device.precision)
    rate = peak * job.efficiency.forward
    seconds = flops * tokens / rate
    return Scoring(flops, tokens, seconds / 3600, score_store_bytes(tokens))


def score_store_bytes(corpus_tokens: int, columns: int = 1) -> int:
    """The values of a finished store: fp16, one per token and column.

    Its JSON files add a few hundred bytes per shard.
    """
    return 2 * corpus_tokens * columns
