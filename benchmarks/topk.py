"""The threshold of an exact top k on one device, beside torch's own operations.

    python -m benchmarks.topk --case all                    # G10: 4,194,304 scores on a GPU
    python -m benchmarks.topk --case all --device cpu       # 262,144 scores: shows that it runs
    python -m benchmarks.topk --case G10-radix --n 1048576  # another size

Ours are the two ways of megatron_slm.selection to the score of the last kept token:

training    find_threshold as a run of one rank calls it, with the counts that are logged: one sort
            on a GPU, a quickselect on a CPU
radix       kth_largest_score: what several ranks use above the size up to which they gather all
            scores, here without other ranks

The peers are torch.topk, torch.kthvalue and torch.sort on the same scores; the fastest of them is
the peer of the ratio. Every call ends with the threshold on the host, as a choice needs it. The
thresholds are compared first: another one fails the case. Medians of interleaved rounds, one JSON
line per case; exit code 1 when a gate is missed by more than 3 %. The clock is CUDA events on a
GPU, which the gate is for, and CPU time of one thread on a CPU, whose own gate is C10 (python -m
benchmarks.selection). The gates are defined at the head of benchmarks/RESULTS.md.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import GATE_SLACK, device_name, seconds_per_call
from megatron_slm.selection.radix import kth_largest_score
from megatron_slm.selection.rankable import rankable
from megatron_slm.selection.threshold import find_threshold, kept_tokens

SCORES = {"cuda": 4_194_304, "cpu": 262_144}
"""How many by default, by device."""


@dataclass(frozen=True)
class Case:
    """One way to the threshold; on a GPU it may take `gate` of the fastest peer's time at most."""

    name: str
    ours: str  # training | radix
    gate: float


CASES = {
    case.name: case
    for case in (
        Case("G10", "training", gate=0.50),
        Case("G10-radix", "radix", gate=0.50),
    )
}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    missed = False
    for case in _cases(options.case):
        row = run_case(case, device, options.n or SCORES[device.type], options.k, options.rounds)
        missed = missed or row["missed"]
        print(json.dumps(row), flush=True)
    return 1 if missed else 0


def run_case(
    case: Case, device: torch.device, scores: int, keep_fraction: float, rounds: int
) -> dict:
    """Measure one case; the returned row is what is printed."""
    generator = torch.Generator(device).manual_seed(0)
    score_N = torch.randn(scores, generator=generator, device=device)
    # As select_top hands it on; the same for all sides, so it is not timed.
    ranked_N = rankable(score_N, torch.ones_like(score_N, dtype=torch.bool))
    ours = our_ways(ranked_N, keep_fraction)[case.ours]
    sides = {"ours": ours} | torch_ways(ranked_N, keep_fraction)
    thresholds = {name: side() for name, side in sides.items()}
    correct = len(set(thresholds.values())) == 1
    clock = "cuda" if device.type == "cuda" else "cpu"
    taken = seconds_per_call(sides, clock, rounds)
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    ours_seconds = median.pop("ours")
    peer = min(median, key=lambda name: median[name])
    ratio = ours_seconds / median[peer]
    gate = case.gate if device.type == "cuda" else None
    return {
        "case": case.name,
        "scores": scores,
        "k": keep_fraction,
        "ours": case.ours,
        "peer": peer,
        "measure": "time",
        "device": device_name(device),
        "torch": torch.__version__,
        "clock": clock,
        "rounds": rounds,
        "ours_median_seconds": round(ours_seconds, 7),
        "peer_median_seconds": round(median[peer], 7),
        "peers_median_seconds": {name: round(value, 7) for name, value in median.items()},
        "ratio": round(ratio, 3),
        "gate": gate,
        "correct": correct,
        "missed": not correct or (gate is not None and ratio > gate * GATE_SLACK),
    }


def our_ways(ranked_N: Tensor, keep_fraction: float) -> dict[str, Callable[[], float]]:
    """Name -> a call that returns the score of the last kept token."""
    return {
        "training": lambda: find_threshold(ranked_N, keep_fraction, None).score,
        "radix": lambda: kth_largest_score(ranked_N, keep_fraction, None)[0],
    }


def torch_ways(ranked_N: Tensor, keep_fraction: float) -> dict[str, Callable[[], float]]:
    """The same by torch's operations; every score competes."""
    kept = kept_tokens(keep_fraction, ranked_N.numel())
    from_below = ranked_N.numel() - kept + 1
    return {
        "torch.topk": lambda: float(ranked_N.topk(kept, sorted=False).values.min()),
        "torch.kthvalue": lambda: float(ranked_N.kthvalue(from_below).values),
        "torch.sort": lambda: float(ranked_N.sort(descending=True).values[kept - 1]),
    }


def _cases(wanted: str) -> list[Case]:
    names = list(CASES) if wanted == "all" else wanted.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown case {unknown[0]}; choose from {', '.join(CASES)} or all")
    return [CASES[name] for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.topk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case", default="all", help=f"{', '.join(CASES)}, commas between them, or all"
    )
    parser.add_argument(
        "--n", type=int, help="scores; default 4,194,304 on a GPU and 262,144 on a CPU"
    )
    parser.add_argument("--k", type=float, default=0.6, help="kept fraction of the scores")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
