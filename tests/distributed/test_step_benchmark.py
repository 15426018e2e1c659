"""The trainer's first step equals that of an unmodified megatron-core GPTModel with a materialised
head, and every CPU side of the step benchmark runs.
"""

import math
import weakref
from types import SimpleNamespace

from benchmarks.step import CASES, LIMITS
from benchmarks.step_sides import Bench, Shape, Side, differences
from benchmarks.train_loop import measure, result
from megatron_slm.testing.spawn import run_on_cpu

SHAPE = Shape(
    layers=2,
    hidden=64,
    feed_forward=128,
    heads=4,
    query_groups=2,
    vocabulary=512,
    sequence_tokens=32,
    sequences=2,
    precision="fp32",
)


def run_every_side(groups) -> tuple[dict[str, float], dict[str, float], list[str]]:
    bench = Bench(SHAPE, groups)
    found = differences(bench)
    reports = {}
    for name in dict.fromkeys(
        name
        for case in CASES.values()
        if case.name.startswith("C")
        for name in (case.ours, case.peer)
    ):
        result = bench.side(name)()
        if hasattr(result, "measured"):
            reports[name] = float(result.measured["selection/kept_fraction"][0])
    models = {name: weakref.ref(side.trainer.models[0]) for name, side in trainers(bench).items()}
    bench.keep_only({"clm"})
    return found, reports, [name for name, model in models.items() if model() is not None]


def trainers(bench: Bench) -> dict[str, Side]:
    """The sides that are our trainer's step."""
    return {name: side for name, side in bench.sides.items() if hasattr(side, "trainer")}


def test_the_first_step_equals_megatron_cores_and_every_side_runs():
    ((found, kept, still_held),) = run_on_cpu(run_every_side)
    for name, limit in LIMITS["fp32"].items():
        assert found[name] <= limit, found
    assert {"precomputed", "online"} <= kept.keys()
    assert still_held == [], "a side that no case needs any more is freed before the next is built"
    assert set(kept.values()) == {math.ceil(SHAPE.keep_fraction * SHAPE.tokens)}


def run_the_loop(groups, folder) -> tuple[list[float], list[float], dict]:
    options = SimpleNamespace(steps=2, rounds=3, clock="cpu", threads=1)
    turns = measure(SHAPE, groups, options, folder)
    return turns.loop_seconds, turns.bare_seconds, result(turns, SHAPE, options)


def test_the_loop_and_bare_steps_take_turns(tmp_path):
    ((loop, bare, row),) = run_on_cpu(run_the_loop, tmp_path)
    assert len(loop) == len(bare) == 3
    assert min(loop + bare) > 0.0
    assert row["blocks"] == 3
    assert row["missed"] == (row["ratio"] > row["gate"])
    assert (tmp_path / "run" / "metrics.jsonl").exists(), "the loop has not logged"
