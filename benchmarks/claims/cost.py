"""Floating-point operations of runs and score stores, by the formulas of megatron_slm.planning."""

from pathlib import Path

from megatron_slm.config.load import load_yaml
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.planning.hardware import GPUS
from megatron_slm.planning.job import Job
from megatron_slm.planning.work import forward_flops, work


def _job(config: Config, vocabulary_size: int, reference: ModelConfig | None = None) -> Job:
    # The device plays no part in the count of operations.
    return Job(config, vocabulary_size, GPUS[0], gpus_per_node=1, fused=False, reference=reference)


def training_flops(
    run: Path, vocabulary_size: int, processed_tokens: float, reference_run: Path | None = None
) -> float:
    """What a run executed: model, head on the rows it trains, online reference, choosing passes."""
    config = load_yaml(run / "config.yaml")
    reference = load_yaml(reference_run / "config.yaml").model if reference_run else None
    return work(_job(config, vocabulary_size, reference)).executed * processed_tokens


def scoring_flops(run: Path, vocabulary_size: int, corpus_tokens: int) -> float:
    """One forward pass of a run's model over a corpus."""
    config = load_yaml(run / "config.yaml")
    return forward_flops(_job(config, vocabulary_size), config.model).forward * float(corpus_tokens)
