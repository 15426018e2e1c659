"""How often a training step reads a tensor on the host, which on a GPU waits for all queued work.

A micro-batch reads twice: what its choice is, and how many rows the head's backward computes; the
step reads its gradient norm. tests/gpu/test_waits_gpu.py counts the waits themselves.
"""

import pytest

from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed import test_layouts
from tests.distributed.bench import SyntheticSamples, local_steps, make_trainer

MICRO_BATCHES = 4
ONLY_ON_A_CPU = "ops/head_call.py _check_ids"
CHOICE = "selection/threshold.py _kth_largest"
ROWS = "ops/head_backward.py head_gradients"
NORM = "model/gradient_norm.py gradient_norm"
SELECTED_ROWS = "ops/selected_linear_cross_entropy.py __init__"
EXPECTED = {
    "data_parallel": {CHOICE: MICRO_BATCHES, ROWS: MICRO_BATCHES, NORM: 1},
    # The second time, the mean of what it has brought to the host.
    "sequence": {"selection/sequence_top.py read": 2 * MICRO_BATCHES, ROWS: MICRO_BATCHES, NORM: 1},
    "clm": {"selection/scope.py chosen": MICRO_BATCHES, ROWS: MICRO_BATCHES, NORM: 1},
    # One choice for the whole step; the head then computes the selected rows only.
    "global_batch": {CHOICE: 1, SELECTED_ROWS: MICRO_BATCHES, NORM: 1},
}


def reads_of_a_step(groups) -> dict[str, dict]:
    """Per case, how often the second step reads, and where; its metrics are recorded too."""
    from megatron_slm.model.optimizer import fuse_updates
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.training.step import train_step
    from tests.host_reads import host_reads

    found = {}
    for case in EXPECTED:
        config = test_layouts.make_config(case, dict(precision="bf16"))
        config.data.micro_batch_size = test_layouts.SEQUENCES // MICRO_BATCHES
        trainer = make_trainer(groups, config)
        fuse_updates(trainer.optimizer)  # as on a GPU: torch's plain AdamW reads its counts
        samples = SyntheticSamples(2 * test_layouts.SEQUENCES)
        first, second = local_steps(groups, config, samples, 2)
        metrics = Metrics(groups.device)
        train_step(trainer, first, TrainingProgress(0, 0), 1e-3)
        with host_reads() as reads:
            report = train_step(trainer, second, TrainingProgress(1, 128), 1e-3)
            metrics.add_all(report.measured)
            metrics.add_sum("tokens/selected", report.selected_tokens)
        found[case] = dict(reads)
    return found


@pytest.fixture(scope="module")
def reads():
    return run_on_cpu(reads_of_a_step)[0]


@pytest.mark.parametrize("case", EXPECTED)
def test_a_step_reads_no_more_than_it_must(reads, case):
    found = {place: count for place, count in reads[case].items() if place != ONLY_ON_A_CPU}
    assert found == EXPECTED[case]
