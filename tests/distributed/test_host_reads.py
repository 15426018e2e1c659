"""How often a training step reads a tensor on the host, which on a GPU waits for all queued work.

A micro-batch reads once: what its choice is, and with it how many rows the head's backward
computes; the step reads its gradient norm. tests/gpu/test_waits_gpu.py counts the waits themselves.
"""

from dataclasses import replace

import pytest

from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed import test_layouts
from tests.distributed.bench import SyntheticSamples, local_steps, make_trainer

MICRO_BATCHES = 4
ONLY_ON_A_CPU = {
    "ops/head_call.py _check_ids",
    # With tensor parallelism megatron-core looks at random states, which are in the CPU's memory,
    # and writes a number into masked places of the embedding, for which a GPU need not be waited.
    "model/decoder.py forward",
    "model/forward_backward.py _run",
}
CHOICE = "selection/threshold.py _kth_largest"
MASK = "selection/scope.py chosen"
PIECES = "selection/select.py split"
NORM = "model/gradient_norm.py gradient_norm"
EXPECTED = {
    "data_parallel": {CHOICE: MICRO_BATCHES, NORM: 1},
    # The second time, the mean of what it has brought to the host.
    "sequence": {"selection/sequence_top.py read": 2 * MICRO_BATCHES, NORM: 1},
    "clm": {MASK: MICRO_BATCHES, NORM: 1},
    # The exact threshold of the step at its end.
    "running threshold": {
        "selection/running_threshold.py _above": MICRO_BATCHES,
        CHOICE: 1,
        NORM: 1,
    },
    # One choice for the whole step, and once the tokens of each of its micro-batches. The head then
    # computes the selected rows only, or all of them.
    "global_batch": {CHOICE: 1, PIECES: 1, NORM: 1},
    "global_batch, all rows": {CHOICE: 1, PIECES: 1, NORM: 1},
    # A choice known before the head, which computes the selected rows only.
    "static scores, selected rows": {CHOICE: MICRO_BATCHES, NORM: 1},
    "stored weights, selected rows": {MASK: MICRO_BATCHES, NORM: 1},
    # Plain training's tokens are counted apart from those with a score.
    "mixed with plain training": {CHOICE: MICRO_BATCHES, MASK: MICRO_BATCHES, NORM: 1},
}
SELECTION = {
    "running threshold": dict(scope="running_threshold"),
    "global_batch, all rows": dict(scope="global_batch", head_rows="all"),
    "static scores, selected rows": dict(scorer="random", head_rows="selected"),
    "stored weights, selected rows": dict(
        scorer="stored_weight", scorer_options={"column": "reference_loss"}, head_rows="selected"
    ),
    "mixed with plain training": dict(clm_weight=0.2),
}
"""What these cases change in the selection of the layouts' table."""


LAYOUTS = {
    "single": {},
    "dp2": dict(dp=2),
    "tp2_sequence_parallel": dict(tp=2, sequence_parallel=True),
}
EXPECTED_IN_LAYOUTS = {
    # Both times on a CPU only: the scores of all ranks, and this rank's own.
    "dp2": {CHOICE: 2 * MICRO_BATCHES, NORM: 1},
    "tp2_sequence_parallel": {
        CHOICE: MICRO_BATCHES,
        "ops/vocab_parallel.py of": MICRO_BATCHES,
        NORM: 1,
    },
}


def reads_of_a_step(groups, layout: str) -> dict[str, dict]:
    """Per case, how often the second step reads, and where; its metrics are recorded too. All cases
    in one process, one in the other layouts.
    """
    from megatron_slm.model.optimizer import fuse_updates
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.training.step import train_step
    from tests.host_reads import host_reads

    found = {}
    for case in EXPECTED if layout == "single" else ("data_parallel",):
        config = test_layouts.make_config(case, dict(precision="bf16", **LAYOUTS[layout]))
        config.selection = replace(config.selection, **SELECTION.get(case, {}))
        config.data.micro_batch_size = test_layouts.SEQUENCES // MICRO_BATCHES // groups.dp_size
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
    return run_layouts_on_cpu(reads_of_a_step, LAYOUTS)


def places(found: dict[str, int]) -> dict[str, int]:
    return {place: count for place, count in found.items() if place not in ONLY_ON_A_CPU}


@pytest.mark.parametrize("case", EXPECTED)
def test_a_step_reads_no_more_than_it_must(reads, case):
    assert places(reads["single"][0][case]) == EXPECTED[case]


@pytest.mark.parametrize("layout", EXPECTED_IN_LAYOUTS)
def test_ranks_read_no_more_than_they_must(reads, layout):
    """With sequence parallelism once more: how many kept rows the fullest tensor rank has."""
    for of_rank in reads[layout]:
        assert places(of_rank["data_parallel"]) == EXPECTED_IN_LAYOUTS[layout]
