"""Which rank keeps the others waiting: the time that each spends on its own work, compared.

No torch.

The ranks of a job finish their steps together, so the length of a step does not show which rank is
slow. What differs is the time a rank works while the others wait for it in a collective.

R: ranks, P: phases.
"""

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

DATA = "waiting for data"
COMPUTE = "forward and backward"
OPTIMIZER = "the optimizer"
CHECKPOINT = "saving a checkpoint"
VALIDATION = "validation"
OTHER = "everything else"
PHASES = (DATA, COMPUTE, OPTIMIZER, CHECKPOINT, VALIDATION, OTHER)

SLOW_INTERVALS = 5
"""Consecutive log intervals in which a rank must be slow before it is reported."""
SLOW_SECONDS = 60.0
"""Least total duration of these intervals: short ones differ by chance."""
SLOW_FRACTION = 0.1
"""A rank is slow in an interval if its extra work takes at least this fraction of the interval."""


@dataclass
class _Streak:
    """Log intervals in a row in which a rank was slow."""

    intervals: int = 0
    seconds: float = 0.0


class SlowRanks:
    """Remembers, from log line to log line, which ranks are slow.

    hosts, stages: of every rank, its machine and its pipeline stage. A rank is compared with those
    of its own stage, because stages have different work.
    """

    def __init__(self, hosts: Sequence[str], stages: Sequence[int]):
        self.hosts = hosts
        self._ranks_of_stage: dict[int, list[int]] = defaultdict(list)
        for rank, stage in enumerate(stages):
            self._ranks_of_stage[stage].append(rank)
        self._streaks = [_Streak() for _ in hosts]
        self._told: set[int] = set()

    def look(
        self, seconds_RP: Sequence[Sequence[float]], interval_seconds: float, steps: int
    ) -> tuple[dict[str, float], str | None]:
        """(metrics of a log interval, a warning if a rank has become slow).

        seconds_RP: what every rank worked in each of PHASES.
        interval_seconds: how long the interval lasted.
        """
        own_R = list(map(sum, seconds_RP))
        others_R = self._others(own_R)
        excess_R = list(map(operator.sub, own_R, others_R))
        slowest = max(range(len(own_R)), key=lambda rank: (excess_R[rank], own_R[rank]))
        metrics = {
            "throughput/slowest_rank": slowest,
            "throughput/slowest_rank_seconds": own_R[slowest] / steps,
            "throughput/slowest_rank_excess_seconds": excess_R[slowest] / steps,
        }
        newly_slow = self._newly_slow(excess_R, interval_seconds)
        if not newly_slow:
            return metrics, None
        worst = max(newly_slow, key=lambda rank: excess_R[rank])
        sentence = self._sentence(newly_slow, worst, own_R[worst] / steps, others_R[worst] / steps)
        return metrics, f"{sentence} {self._where(seconds_RP, worst)}"

    def _others(self, seconds_R: Sequence[float]) -> list[float]:
        """For every rank the median of the others of its stage; its own where it is alone."""
        others_R = list(seconds_R)
        for ranks in self._ranks_of_stage.values():
            ranked = sorted(ranks, key=lambda rank: seconds_R[rank])
            in_order = [seconds_R[rank] for rank in ranked]
            for place, rank in enumerate(ranked if len(ranked) > 1 else []):
                others_R[rank] = median_without(in_order, place)
        return others_R

    def _newly_slow(self, excess_R: Sequence[float], interval_seconds: float) -> list[int]:
        """Ranks that have been slow for long enough, and were not reported before."""
        ranks = []
        for rank, (streak, excess) in enumerate(zip(self._streaks, excess_R, strict=True)):
            if excess < SLOW_FRACTION * interval_seconds:
                self._streaks[rank] = _Streak()
                continue
            streak.intervals += 1
            streak.seconds += interval_seconds
            long_enough = streak.intervals >= SLOW_INTERVALS and streak.seconds >= SLOW_SECONDS
            if long_enough and rank not in self._told:
                ranks.append(rank)
        self._told.update(ranks)
        return ranks

    def _sentence(
        self, ranks: Sequence[int], worst: int, own_seconds: float, others_seconds: float
    ) -> str:
        named = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks)
        streak = self._streaks[worst]
        return (
            f"slower than the others for {streak.intervals} log intervals "
            f"({streak.seconds:.0f} s): {named}. Rank {worst} works {own_seconds:.3f} s per step, "
            f"the others {others_seconds:.3f} s (median), and wait for it."
        )

    def _where(self, seconds_RP: Sequence[Sequence[float]], rank: int) -> str:
        """The phase in which a rank loses most, and what to do."""
        lost_P = []
        for phase_index, own_seconds in enumerate(seconds_RP[rank]):
            of_phase_R = [seconds_P[phase_index] for seconds_P in seconds_RP]
            lost_P.append(own_seconds - self._others(of_phase_R)[rank])
        phase = PHASES[lost_P.index(max(lost_P))]
        return (
            f"Most of the difference is in {phase}. Look at that machine "
            "(docs/monitoring.md, A slow rank)"
        )


def median_without(values: Sequence[float], place: int) -> float:
    """The median of ascending values without the one at `place`; of two or more.

    A sort for each rank would take seconds on thousands of them.
    """
    others = len(values) - 1

    def without(index: int) -> float:
        return values[index] if index < place else values[index + 1]

    if others % 2:
        return without(others // 2)
    return (without(others // 2 - 1) + without(others // 2)) / 2
