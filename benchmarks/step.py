"""Whole training steps and whole scoring passes beside megatron-core's, in interleaved rounds.

    python -m benchmarks.step --case C8                       # a named case with its gate
    python -m benchmarks.step --case C8,C9                    # several over the same rounds
    python -m benchmarks.step --case all  # C8, C9, C18 on CPU; G6 to G9, G12, G13 with CUDA
    python -m benchmarks.step --case C8 --layers 2 --seq 128  # smaller

A training step is everything `megatron_slm.train` does between two batches: (reference forward,)
forward, choice, backward, clipping, AdamW, sums for the metrics. Peers: `clm` is megatron-core's
plain CLM step, `forward` its forward pass with labels under no_grad; both are an unmodified
GPTModel of the same layers (benchmarks/step_sides.py). All run in one process. The first step is
compared first (`--no-check` skips it): token losses, selected set, gradients; a difference fails
every case. One JSON line per case; exit code 1 when a gate is missed by more than 3 %. The gates
(C8, G6 …) are defined at the head of benchmarks/RESULTS.md.

CPU time of one thread by default; `--clock wall --threads N` on an idle machine. On CUDA the clock
is CUDA events, and two more figures give this device's ceilings: an 8192 x 8192 x 8192 bf16 product
and an 8 GB copy. There a trainer takes 20 GB and more, so at most the two sides of one case are in
memory: cases of the same two share their rounds, and what the next case does not need is freed
first. A case that does not fit, or needs what is not installed, says so in its row, and the others
go on.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measure import (
    GATE_SLACK,
    Unavailable,
    device_name,
    peak_extra_bytes,
    release_memory,
    seconds_per_call,
)
from benchmarks.step_sides import Bench, Shape, differences
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.device import choose_device
from megatron_slm.monitoring import model_flops_per_token, peak_flops_per_second
from megatron_slm.parallel import join_job, leave_job

SMALL = Shape(
    layers=8,
    hidden=512,
    feed_forward=1408,
    heads=8,
    query_groups=8,
    vocabulary=32000,
    sequence_tokens=512,
    sequences=4,
    precision="fp32",
)
TINYLLAMA = Shape(
    layers=22,
    hidden=2048,
    feed_forward=5632,
    heads=32,
    query_groups=4,
    vocabulary=32000,
    sequence_tokens=2048,
    sequences=8,
    precision="bf16",
)
LLAMA3_8B_LAYERS = Shape(
    layers=8,
    hidden=4096,
    feed_forward=14336,
    heads=32,
    query_groups=8,
    vocabulary=32000,
    sequence_tokens=2048,
    sequences=4,
    precision="bf16",
)
"""A quarter of Llama-3-8B's layers with a small vocabulary: 2 B parameters, 36 GB a trainer."""
PRODUCT_FLOPS_PER_SECOND = 790e12
"""The ceiling of G9: estimated for a large bf16 product before any was measured. The one H200 that
was (2026-11-26) reached 706e12 at 8192 x 8192 x 8192."""
LIMITS = {
    "fp32": {"loss": 1e-5, "selected": 0, "gradient": 1e-4},
    "bf16": {"loss": 1e-2, "selected": None, "gradient": 2e-2},
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    gate: the largest ratio ours / peer. With a floor instead, `ours` alone must reach that fraction
    of a ceiling; fused_floor: with Transformer Engine's layers.
    """

    name: str
    shape: Shape
    ours: str
    peer: str = "clm"
    measure: str = "time"  # time | memory | mfu | forward_share
    gate: float | None = None
    floor: float | None = None
    fused_floor: float | None = None


CASES = {
    case.name: case
    for case in (
        Case("C8", SMALL, "precomputed", gate=0.93),
        Case("C9", SMALL, "online", gate=1.28),
        Case("C8-known", SMALL, "known"),
        Case("C8-last-layer", SMALL, "last-layer", "torch-layers"),
        Case("C8-every-layer", SMALL, "every-layer", "torch-layers"),
        Case("C18", SMALL, "score", "forward", gate=0.88),
        Case("C18-memory", SMALL, "score", "forward", "memory", gate=0.2),
        Case("G6", TINYLLAMA, "precomputed", gate=0.97),
        Case("G6-fused", TINYLLAMA, "precomputed", "clm-fused"),
        Case("G6-known", TINYLLAMA, "known"),
        Case("G7", TINYLLAMA, "online", gate=1.27),
        Case("G8", TINYLLAMA, "precomputed", measure="mfu", floor=0.48, fused_floor=0.51),
        Case(
            "G9",
            TINYLLAMA,
            "score",
            "forward",
            measure="forward_share",
            floor=0.655,
            fused_floor=0.70,
        ),
        Case("G12", TINYLLAMA, "last-layer", "torch-layers", gate=0.99),
        Case("G12-every-layer", TINYLLAMA, "every-layer", "torch-layers"),
        Case("G13", LLAMA3_8B_LAYERS, "fp8", "precomputed", gate=0.80),
    )
}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    groups = join_job(ParallelConfig(), device, seed=1)
    missed = 0
    try:
        if device.kind == "cuda":
            print(json.dumps(ceilings()), flush=True)
        chosen = _cases(options, device.kind)
        for shape in dict.fromkeys(case.shape for case in chosen):
            cases = [case for case in chosen if case.shape == shape]
            for row in run_cases(cases, Bench(shape, groups), options):
                missed += row.get("missed", False)
                print(json.dumps(row), flush=True)
            release_memory(groups.device)
    finally:
        leave_job()
    return 1 if missed else 0


def run_cases(
    cases: list[Case], bench: Bench, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Measure cases of one shape; yields what is printed.

    On a CPU over common rounds, on CUDA over those of the cases with the same two sides.
    """
    try:
        found = differences(bench) if options.check else {}
    except torch.OutOfMemoryError as why:
        yield from _skipped(cases, why)
        return
    common = _common(bench, found, options)
    correct = not found or _acceptable(found, LIMITS[bench.shape.precision])
    for together in _common_rounds(cases, bench.groups.device.type):
        try:
            rows = list(_measured(together, bench, options))
        except (Unavailable, torch.OutOfMemoryError) as why:
            rows = _skipped(together, why)
        for row in rows:
            if "skipped" not in row:
                row |= {"correct": correct, "missed": not (correct and row.pop("met"))}
            yield {"case": row.pop("case")} | common | row


def _skipped(cases: list[Case], why: Exception) -> list[dict[str, Any]]:
    reason = str(why).splitlines()[0]
    return [{"case": case.name, "skipped": reason} for case in cases]


def _common_rounds(cases: list[Case], device_type: str) -> list[list[Case]]:
    """Cases that are measured together."""
    if device_type != "cuda":
        return [cases]
    together: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        together.setdefault((case.ours, case.peer), []).append(case)
    return list(together.values())


def _common(bench: Bench, found: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a shape say."""
    shape = bench.shape
    return {
        "layers": shape.layers,
        "hidden": shape.hidden,
        "vocabulary": shape.vocabulary,
        "tokens": shape.tokens,
        "precision": shape.precision,
        "k": shape.keep_fraction,
        "layer_kind": bench.layers,
        "device": device_name(bench.groups.device),
        "torch": torch.__version__,
        "threads": options.threads,
        "differences": {name: float(f"{value:.2e}") for name, value in found.items()},
    }


def _measured(
    cases: list[Case], bench: Bench, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The cases' rows, without what is common to their shape."""
    device = bench.groups.device
    if device.type == "cuda":
        bench.keep_only({name for case in cases for name in (case.ours, case.peer)})
    sides = {}
    timed = {}
    for case in cases:
        for name in (case.ours, case.peer):
            sides[name] = bench.side(name)
            if case.measure != "memory":
                timed[name] = sides[name]
    clock = "cuda" if device.type == "cuda" else options.clock
    times = seconds_per_call(timed, clock, options.rounds or (10 if clock == "cuda" else 5))
    for case in cases:
        row: dict[str, Any] = {
            "case": case.name,
            "ours": case.ours,
            "peer": case.peer,
            "measure": case.measure,
        }
        if case.measure == "memory":
            row |= _memory(case, sides, device)
        else:
            row |= _time(case, times, clock)
        floor = case.fused_floor if bench.layers == "transformer_engine" else case.floor
        if floor is not None:
            row |= _share_of_ceiling(case, times, device)
            met = row["share"] * GATE_SLACK >= floor
        else:
            met = case.gate is None or row["ratio"] <= case.gate * GATE_SLACK
        yield row | {"gate": case.gate, "floor": floor, "met": met}


def _acceptable(found: dict[str, float], limits: dict[str, float | None]) -> bool:
    """Whether the differences of the first step are within their limits; None = no limit."""
    return all(limit is None or found[name] <= limit for name, limit in limits.items())


def _time(case: Case, times: dict[str, list[float]], clock: str) -> dict:
    ours, peer = times[case.ours], times[case.peer]
    row = {
        "clock": clock,
        "rounds": len(ours),
        "ours_median_seconds": statistics.median(ours),
        "peer_median_seconds": statistics.median(peer),
    }
    row |= {"ours_min_seconds": min(ours), "peer_min_seconds": min(peer)}
    row |= {
        "ratio": row["ours_median_seconds"] / row["peer_median_seconds"],
        "ratio_of_minima": min(ours) / min(peer),
    }
    # Neighbouring rounds meet the same neighbours on a shared machine: their ratios move least.
    row["median_of_round_ratios"] = statistics.median(
        a / b for a, b in zip(ours, peer, strict=True)
    )
    return {
        name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()
    }


def _memory(case: Case, sides: dict, device: torch.device) -> dict:
    """Peak above what is in use before the call: activations, logits, losses.

    Weights count on neither side.
    """
    extra = {
        role: peak_extra_bytes(sides[name], device)
        for role, name in (("ours", case.ours), ("peer", case.peer))
    }
    return {f"{role}_mib": round(value / 2**20, 1) for role, value in extra.items()} | {
        "ratio": round(extra["ours"] / extra["peer"], 4)
    }


def _share_of_ceiling(case: Case, times: dict[str, list[float]], device: torch.device) -> dict:
    """Model FLOPs per second over the device's peak, or over what a product reaches.

    Every token counts in full, selected or not.
    """
    flops = model_flops_per_token(
        case.shape.config().model, case.shape.sequence_tokens, case.shape.vocabulary
    )
    tokens_per_second = case.shape.tokens / statistics.median(times[case.ours])
    per_token = flops.training if case.measure == "mfu" else flops.forward
    name = device_name(device)
    if case.measure == "forward_share":
        ceiling: float | None = PRODUCT_FLOPS_PER_SECOND
    else:
        ceiling = peak_flops_per_second(name, case.shape.precision)
    if ceiling is None:
        raise Unavailable(
            f"{case.name} needs the device's peak, and {name!r} has no known one; "
            "run it on an H100 or H200"
        )
    return {
        "tokens_per_second": round(tokens_per_second),
        "share": round(tokens_per_second * per_token / ceiling, 4),
    }


def ceilings() -> dict:
    """What this GPU reaches at best, measured in the same call as the cases."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(4 << 30, device="cuda", dtype=torch.uint8) for _ in range(2))
    times = seconds_per_call(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, "cuda", rounds=20
    )
    product, copy = (statistics.median(times[name]) for name in ("product", "copy"))
    return {
        "ceilings": torch.cuda.get_device_name(),
        "product_tflops": round(2 * 8192**3 / product / 1e12, 1),
        "copy_tb_s": round(2 * (4 << 30) / copy / 1e12, 2),
    }


def _cases(options: argparse.Namespace, device_kind: str) -> list[Case]:
    names = options.case.split(",")
    if options.case == "all":
        letter = "G" if device_kind == "cuda" else "C"
        names = [name for name in CASES if name.startswith(letter)]
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown case {unknown[0]}; choose from {', '.join(CASES)} or all")
    changes = {
        "layers": options.layers,
        "hidden": options.hidden,
        "vocabulary": options.vocab,
        "sequence_tokens": options.seq,
        "sequences": options.mbs,
        "keep_fraction": options.k,
        "precision": options.precision,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return [replace(CASES[name], shape=replace(CASES[name].shape, **changes)) for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        required=True,
        help=f"{', '.join(CASES)}, several with commas, or all; the options below change the shape",
    )
    parser.add_argument("--layers", type=int, help="transformer layers")
    parser.add_argument("--hidden", type=int, help="hidden size")
    parser.add_argument("--vocab", type=int, help="vocabulary size")
    parser.add_argument("--seq", type=int, help="tokens of a sequence")
    parser.add_argument("--mbs", type=int, help="sequences of the micro-batch")
    parser.add_argument("--k", type=float, help="kept fraction of the tokens")
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, help="interleaved rounds; default 5, on CUDA 10")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="skip the comparison of the first step",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
