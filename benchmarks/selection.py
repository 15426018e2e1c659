"""Time and bytes of exact selection, beside all_gather + torch.topk.

    python -m benchmarks.selection                       everything, about 6 minutes on 2 cores
    python -m benchmarks.selection --part one-process    gate C10 (gates: benchmarks/RESULTS.md)
    python -m benchmarks.selection --part ranks --ranks 4 --tokens 4194304        gate C11
    python -m benchmarks.selection --part describe       the sums and counts, beside one product
    python -m benchmarks.selection --part diagnostics    the same in real training steps
    python -m benchmarks.selection --part scaling        to 512 ranks, from measured parts

Both sides run in the same processes in alternating rounds; figures are medians. CPU seconds are of
one rank, all its threads (the slowest rank), and are what to read on a shared machine. Answers are
compared in the same run. Exit code 1 when a gate is missed by more than 3 %.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.measure import GATE_SLACK, median_cpu_seconds
from benchmarks.selection_diagnostics import description_cost, diagnostics_in_training
from benchmarks.selection_ranks import KEEP, on_ranks, topk_mask
from benchmarks.selection_scaling import scaling
from megatron_slm.selection import select_top
from megatron_slm.selection.radix import kth_largest_score
from megatron_slm.selection.rankable import rankable
from megatron_slm.selection.threshold import find_threshold, kept_tokens, quickselect

QUICKSELECT_GATE = 0.12  # C10


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    lines: list[dict] = []
    if options.part in ("all", "one-process"):
        lines += one_process(max(options.tokens), options.rounds)
    if options.part in ("all", "ranks"):
        for ranks in options.ranks:
            lines += on_ranks(ranks, options.tokens, options.rounds)
    if options.part in ("all", "describe"):
        lines += description_cost(options.rounds)
    if options.part in ("all", "diagnostics"):
        lines += diagnostics_in_training(options.rounds)
    if options.part in ("all", "scaling"):
        lines += scaling(options.rounds)
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    missed = [
        line for line in lines if line.get("gate") and line["ratio"] > line["gate"] * GATE_SLACK
    ]
    for line in missed:
        print(
            f"GATE MISSED: {line['case']}: {line['ratio']:.3f}, allowed {line['gate']:.3f}",
            file=sys.stderr,
        )
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part",
        choices=["all", "one-process", "ranks", "describe", "diagnostics", "scaling"],
        default="all",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8], help="processes of the part `ranks`"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[16_384, 65_536, 262_144, 1_048_576, 4_194_304],
        help="over all ranks",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append one line per case to this file")
    return parser


def one_process(tokens: int, rounds: int) -> list[dict]:
    """C10: thresholds and masks without other ranks."""
    score = torch.randn(tokens, generator=torch.Generator().manual_seed(0))
    eligible = torch.ones_like(score, dtype=torch.bool)
    kept = kept_tokens(KEEP, tokens)
    ranked = rankable(score, eligible)
    ways = {
        "threshold: ours (quickselect)": lambda: quickselect(ranked.numpy(), tokens - kept),
        "threshold: ours, with all counts": lambda: find_threshold(ranked, KEEP, None).score,
        "threshold: ours (radix)": lambda: kth_largest_score(ranked, KEEP, None)[0],
        "threshold: torch.kthvalue": lambda: float(ranked.kthvalue(tokens - kept + 1).values),
        "threshold: torch.topk": lambda: float(ranked.topk(kept, sorted=False).values.min()),
        "threshold: torch.sort": lambda: float(ranked.sort(descending=True).values[kept - 1]),
        "mask: ours (select_top)": lambda: select_top(score, eligible, KEEP).mask,
        "mask: torch.topk": lambda: topk_mask(ranked, kept),
    }
    answers = {name: way() for name, way in ways.items()}
    assert len({answer for name, answer in answers.items() if name.startswith("threshold")}) == 1
    assert torch.equal(answers["mask: ours (select_top)"], answers["mask: torch.topk"])
    seconds = median_cpu_seconds(ways, rounds)
    peers = {"threshold": seconds["threshold: torch.kthvalue"], "mask": seconds["mask: torch.topk"]}
    print(f"\n### One process, {tokens} tokens, keep fraction {KEEP}, CPU ms\n")
    print("| what | CPU ms | of the peer | gate |\n|---|---|---|---|")
    lines = []
    for name, value in seconds.items():
        ratio = value / peers[name.split(":")[0]]
        gate = QUICKSELECT_GATE if name == "threshold: ours (quickselect)" else None
        lines.append(
            {"case": f"C10 {name}, {tokens}", "cpu_seconds": value, "ratio": ratio, "gate": gate}
        )
        print(f"| {name} | {value * 1e3:.1f} | {ratio:.3f} | {f'C10 {gate}' if gate else ''} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
