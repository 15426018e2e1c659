"""The recorder equals sums over all ranks divided once, whatever each rank saw."""

import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_slm.monitoring import Metrics

WORLD = 3


def record_rank(metrics: Metrics, rank: int) -> None:
    """Unequal counts, a metric that one rank lacks, a histogram with an empty bin."""
    for micro_batch in range(rank + 1):
        metrics.add("loss/all", torch.tensor(10.0 * rank + micro_batch), torch.tensor(rank + 1))
    metrics.add("selection/rate", torch.tensor([1.0, 0.0, rank]), torch.tensor([2.0, 0.0, 4.0]))
    metrics.add_sum("tokens/selected", 100 + rank)
    metrics.add_max("throughput/slowest_seconds", 0.5 * rank)
    if rank == 1:
        metrics.add("loss/rejected", 6.0, 4)


def reduce_in_group(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD
    )
    try:
        metrics = Metrics()
        results = []
        for _ in range(2):
            record_rank(metrics, rank)
            results.append(metrics.reduce(dist.group.WORLD))
        # A maximum and a sum that only one rank knows, in a later interval of the same recorder.
        if rank == 2:
            metrics.add_max("late/max", 7.0)
            metrics.add_sum("late/sum", 3)
        results.append(metrics.reduce(dist.group.WORLD))
        results.append(cut_by_a_checkpoint(rank))
        torch.save(results, f"{folder}/result_{rank}.pt")
    finally:
        dist.destroy_process_group()


def cut_by_a_checkpoint(rank: int) -> tuple[dict, dict]:
    """The same interval, once through and once saved half-way and continued by a fresh recorder."""
    whole, resumed = Metrics(), Metrics()
    record_rank(whole, rank)
    state = json.loads(json.dumps(whole.state_dict(dist.group.WORLD)))
    resumed.add("left over", 1)  # from before the checkpoint was loaded: must not count
    resumed.load_state_dict(state)
    for metrics in (whole, resumed):
        record_rank(metrics, 2 - rank)
    return whole.reduce(dist.group.WORLD), resumed.reduce(dist.group.WORLD)


def test_reduction_over_three_processes(tmp_path):
    multiprocessing.spawn(reduce_in_group, (str(tmp_path),), nprocs=WORLD)
    results = [torch.load(tmp_path / f"result_{rank}.pt") for rank in range(WORLD)]
    assert repr(results[0]) == repr(results[1]) == repr(results[2])
    for first in results[0][:2]:
        # numerators: 0 | 10, 11 | 20, 21, 22; counts: 1 | 2, 2 | 3, 3, 3. A mean of the ranks'
        # ratios would be 4.08.
        assert first["loss/all"] == pytest.approx(84 / 14, abs=1e-12)
        assert first["loss/rejected"] == 1.5
        assert first["tokens/selected"] == 303
        assert first["throughput/slowest_seconds"] == 1.0
        assert first["selection/rate"][0] == 0.5
        assert first["selection/rate"][2] == 3 / 12
        assert math.isnan(first["selection/rate"][1])
    assert results[0][2]["late/max"] == 7.0
    assert results[0][2]["late/sum"] == 3.0
    assert "loss/all" not in results[0][2], "an interval must not repeat the one before"
    whole, resumed = results[0][3]
    assert repr(whole) == repr(resumed)
    assert whole["tokens/selected"] == 606
    assert whole["loss/all"] == pytest.approx(84 / 14)


def test_alone_and_cleared_between_intervals():
    metrics = Metrics()
    metrics.add("a", 3, 4)
    metrics.add("a", torch.tensor(1), torch.tensor(4))
    assert metrics.reduce() == {"a": 0.5}
    metrics.add("a", 2, 1)
    assert metrics.reduce() == {"a": 2.0}
    assert metrics.reduce() == {}


def test_a_vector_of_one_stays_a_list_and_a_summary_gets_the_sums():
    metrics = Metrics()
    metrics.add_all(
        {
            "by_corpus": (torch.tensor([3.0]), torch.tensor([4.0])),
            "loss": (torch.tensor(5.0), torch.tensor(2.0)),
        }
    )
    metrics.add_sum("tokens", 7)
    seen = {}
    values = metrics.reduce(summarise=lambda pairs: seen.update(pairs) or {"rate": 1.0})
    assert values == {"rate": 1.0, "tokens": 7.0}
    assert {name: (total.tolist(), count.tolist()) for name, (total, count) in seen.items()} == {
        "by_corpus": ([3.0], [4.0]),
        "loss": (5.0, 2.0),
    }
    metrics.add("by_corpus", torch.tensor([3.0]), torch.tensor([4.0]))
    assert metrics.reduce() == {"by_corpus": [0.75], "tokens": 0.0}, (
        "a total of a quiet interval is 0, a ratio of one is left out"
    )


def test_sums_of_many_small_values_do_not_drift():
    metrics = Metrics()
    metrics.add_sum("tokens", 2.0**25)
    for _ in range(1000):
        metrics.add_sum("tokens", torch.tensor(1.0))
    # fp32 accumulation would lose every one of the ones.
    assert metrics.reduce()["tokens"] == 2**25 + 1000


def test_recorded_tensors_do_not_keep_the_graph():
    loss = torch.ones(3, requires_grad=True)
    metrics = Metrics()
    metrics.add("loss", loss.sum(), 3)
    assert metrics.reduce() == {"loss": 1.0}
    assert not any(part.requires_grad for part in metrics._sums["loss"].parts)


@pytest.mark.parametrize(
    "first, second",
    [
        (lambda m: m.add("x", 1), lambda m: m.add("x", torch.ones(3))),
        (lambda m: m.add("x", 1), lambda m: m.add_sum("x", 1)),
        (lambda m: None, lambda m: m.add("x", torch.ones(2, 2))),
        (lambda m: None, lambda m: m.add_max("x", torch.ones(2))),
    ],
)
def test_a_metric_that_changes_shape_or_kind_is_named(first, second):
    metrics = Metrics()
    first(metrics)
    with pytest.raises(ValueError, match="'x'"):
        second(metrics)
