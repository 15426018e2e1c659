"""How often a training step waits for the GPU. Skipped without CUDA.

tests/distributed/test_host_reads.py counts the same places on a CPU.
"""

import warnings

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def waits(bench, micro_batches: int) -> list[str]:
    """What torch says of every synchronising call of one step."""
    from benchmarks.step_sides import LEARNING_RATE, PROGRESS
    from megatron_slm.training.step import train_step

    trainer = bench.side("precomputed").trainer
    batches = [bench.own_batch() for _ in range(micro_batches)]
    train_step(trainer, batches, PROGRESS, LEARNING_RATE)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(trainer, batches, PROGRESS, LEARNING_RATE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(each.message) for each in said if "synchronizing" in str(each.message)]


def test_a_micro_batch_waits_once_and_the_step_once(groups):
    """For the choice, which brings the number of rows that backward computes; and for the gradient
    norm.
    """
    from benchmarks.step_sides import Bench, Shape

    bench = Bench(
        Shape(
            layers=2,
            hidden=256,
            feed_forward=704,
            heads=4,
            query_groups=4,
            vocabulary=2048,
            sequence_tokens=128,
            sequences=2,
            precision="bf16",
        ),
        groups,
    )
    for micro_batches in (1, 4):
        found = waits(bench, micro_batches)
        assert len(found) == micro_batches + 1, found
