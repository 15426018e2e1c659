"""When a rank is called slow, whom it is compared with, and what is said of it."""

import statistics

import pytest

from megatron_slm.monitoring.slow_ranks import (
    COMPUTE,
    DATA,
    PHASES,
    SlowRanks,
    median_without,
)

SECONDS = 20.0  # of every log interval here
STEPS = 10


def interval(**phases: float) -> list[float]:
    """What a rank works in a log interval."""
    named = {DATA: phases.get("data", 0.5), COMPUTE: phases.get("compute", 10.0)}
    return [named.get(phase, 0.0) for phase in PHASES]


def told(ranks: SlowRanks, *intervals: list[list[float]]) -> list[str | None]:
    return [ranks.look(seconds_RP, SECONDS, STEPS)[1] for seconds_RP in intervals]


def four(stages: list[int] | None = None) -> SlowRanks:
    return SlowRanks(["n1", "n1", "n2", "n2"], stages or [0, 0, 0, 0])


EVEN = [interval()] * 4
SLOW = [interval(), interval(), interval(compute=13.0), interval()]


def test_a_rank_that_stays_slow_is_named_with_its_machine_and_its_phase():
    found = told(four(), *[SLOW] * 8)
    assert [place for place, sentence in enumerate(found) if sentence] == [4], "told once"
    assert found[4].startswith("slower than the others for 5 log intervals (100 s): rank 2 on n2.")
    assert (
        "Rank 2 works 1.350 s per step, the others 1.050 s (median), and wait for it." in found[4]
    )
    assert "Most of the difference is in forward and backward." in found[4]


def test_the_wait_for_data_is_a_phase_of_its_own():
    slow = [interval(), interval(data=4.0), interval(), interval()]
    assert "rank 1 on n1. " in (sentence := told(four(), *[slow] * 5)[4])
    assert "Most of the difference is in waiting for data." in sentence


def test_a_slow_interval_now_and_then_is_no_warning():
    assert told(four(), *[SLOW, SLOW, SLOW, SLOW, EVEN] * 4) == [None] * 20


def test_short_intervals_are_no_warning():
    """Below a minute of all together, ranks of small runs differ by chance."""
    ranks = four()
    shorter = [interval(data=0.05, compute=seconds) for seconds in (1.0, 1.0, 1.3, 1.0)]
    found = [ranks.look(shorter, SECONDS / 10, STEPS)[1] for _ in range(35)]
    assert [place for place, sentence in enumerate(found) if sentence] == [29]


def test_ranks_that_are_slow_together_are_told_together():
    slow = [interval(), interval(), interval(compute=14.0), interval(compute=14.0)]
    ranks = SlowRanks(["n1"] * 3 + ["n2"] * 2, [0] * 5)
    assert "rank 3 on n2, rank 4 on n2." in told(ranks, *[[interval(), *slow]] * 5)[4]


def test_pipeline_stages_are_not_compared_with_each_other():
    """The last one has the head, and is no slow machine."""
    stages = [interval(), interval(), interval(compute=14.0), interval(compute=14.0)]
    assert told(four([0, 0, 1, 1]), *[stages] * 8) == [None] * 8
    assert told(four([0, 1, 2, 3]), *[stages] * 8) == [None] * 8
    slow = [interval(), interval(), interval(compute=14.0), interval(compute=17.0)]
    assert "rank 3 on n2. " in told(four([0, 0, 1, 1]), *[slow] * 5)[4]


def test_every_log_line_has_the_slowest_rank():
    metrics, _ = four().look(SLOW, SECONDS, STEPS)
    assert metrics == {
        "throughput/slowest_rank": 2,
        "throughput/slowest_rank_seconds": pytest.approx(1.35),
        "throughput/slowest_rank_excess_seconds": pytest.approx(0.3),
    }


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_the_median_of_the_others(count):
    values = [1.0, 1.5, 2.5, 4.0, 7.0, 7.0, 11.0][:count]
    for place in range(count):
        others = values[:place] + values[place + 1 :]
        assert median_without(values, place) == statistics.median(others)
