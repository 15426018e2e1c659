"""One training step on a GPU against an unmodified megatron-core GPTModel. Skipped without CUDA.

It asserts what cases G6 to G8 of the step benchmark assert; benchmarks/RESULTS.md defines them.
"""

import math

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_step_equals_megatron_cores(precision, groups):
    from benchmarks.step import LIMITS
    from benchmarks.step_sides import Bench, Shape, differences

    torch.backends.cuda.matmul.allow_tf32 = False
    shape = Shape(
        layers=4,
        hidden=512,
        feed_forward=1408,
        heads=8,
        query_groups=4,
        vocabulary=4096,
        sequence_tokens=256,
        sequences=4,
        precision=precision,
    )
    found = differences(Bench(shape, groups))
    for name, limit in LIMITS[precision].items():
        assert limit is None or found[name] <= limit, (name, found)


def test_an_online_reference_and_scoring_give_the_losses_of_the_same_weights(groups):
    from benchmarks.step_sides import Bench, Shape

    shape = Shape(
        layers=2,
        hidden=256,
        feed_forward=704,
        heads=4,
        query_groups=4,
        vocabulary=2048,
        sequence_tokens=128,
        sequences=2,
        precision="bf16",
    )
    bench = Bench(shape, groups)
    report = bench.side("online")()
    assert report.updated
    assert bench.side("score")().shape == (2, 128)
    assert report.measured["selection/kept_fraction"][0] == math.ceil(0.6 * shape.tokens)


def test_a_side_that_is_no_longer_needed_gives_its_memory_back(groups):
    """Seven trainers of TinyLlama's size do not fit a GPU: the step benchmark keeps two."""
    from benchmarks.measure import release_memory
    from benchmarks.step_sides import Bench, Shape

    shape = Shape(
        layers=4,
        hidden=512,
        feed_forward=1408,
        heads=8,
        query_groups=8,
        vocabulary=8192,
        sequence_tokens=128,
        sequences=2,
        precision="bf16",
    )
    bench = Bench(shape, groups)
    bench.side("score")()  # what stays for good: cuBLAS's workspaces, compiled kernels
    bench.keep_only(set())
    release_memory(groups.device)
    before_bytes = torch.cuda.memory_allocated()
    for name in ("precomputed", "clm"):
        bench.side(name)()
    held_bytes = torch.cuda.memory_allocated() - before_bytes
    bench.keep_only(set())
    left_bytes = torch.cuda.memory_allocated() - before_bytes
    assert left_bytes < 0.05 * held_bytes
