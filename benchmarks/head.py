"""The loss head beside its peers: time, memory and accuracy, in one process, in interleaved rounds.

    python -m benchmarks.head --case C1        # a named case with its gate
    python -m benchmarks.head --case all       # C1 to C7 on CPU, G1 to G5 where there is CUDA
    python -m benchmarks.head --n 2048 --hidden 512 --vocab 32000 --dtype fp32 --k 0.6 \\
        --mode keep --peer megatron

Each round runs ours and the peer once, forward and backward, on the same tensors. One JSON line per
case: medians, minima, and the ratio ours / peer of medians and of minima; or why it was skipped,
where its peer is not installed. The selected rows'
gradients are compared with fp64 first (`--no-check` skips it), and a wrong gradient fails the case
whatever its speed. Exit code 1 when a gate is missed by more than 3 %. The gates (C1 …, G1 …) are
defined at the head of benchmarks/RESULTS.md.

Peers:

megatron            megatron-core's head: weight product, vocab_parallel_cross_entropy, masked loss,
                    backward
megatron-fused      the same with fused_vocab_parallel_cross_entropy
megatron-widened    the same on fp32 copies of bf16 operands, made inside the timed region: the
                    stronger peer on a CPU without bf16 units, where torch's bf16 products are many
                    times slower than widening
torch-lce           torch.nn.functional.linear_cross_entropy(reduction="none")
liger               Liger-Kernel's fused per-token cross entropy: its Hopper kernels where there is
                    such a GPU, else its chunked torch

CPU time of one thread by default (`--clock cpu`), which other work on the machine disturbs least;
`--clock wall --threads N` on an idle one. On CUDA the clock is CUDA events.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace

import torch

from benchmarks.head_peers import Problem, Side, contenders
from benchmarks.measure import (
    GATE_SLACK,
    Unavailable,
    device_name,
    peak_extra_bytes,
    release_memory,
    seconds_per_call,
)

GPU_ROUNDS = 20
"""Of G1 to G5: a round of both sides takes 20 to 100 ms, so that all cases take a minute."""


@dataclass(frozen=True)
class Case:
    """One comparison and the ratio it must reach."""

    name: str
    tokens: int = 4096
    hidden: int = 1024
    vocabulary: int = 32000
    dtype: str = "bf16"
    keep_fraction: float = 0.6
    ours: str = "auto"  # auto | keep | recompute | known | liger
    peer: str = "megatron"
    measure: str = "time"  # time | memory
    chunk_tokens: int | None = None
    main_grad: bool = False
    """Whether the weight's gradient goes into main_grad, as in training."""
    gate: float | None = None
    rounds: int = 3


G1 = dict(tokens=8192, hidden=4096, vocabulary=131072, rounds=GPU_ROUNDS)
G2 = dict(tokens=16384, hidden=2048, vocabulary=32000, rounds=GPU_ROUNDS)
G3 = dict(tokens=8192, hidden=4096, vocabulary=128256, rounds=GPU_ROUNDS)
CASES = {
    case.name: case
    for case in (
        Case("C1", gate=0.80),
        Case("C2", vocabulary=128256, gate=0.78),
        Case("C3", dtype="fp32", ours="keep", gate=0.80),
        Case("C4", ours="known", gate=0.62),
        Case(
            "C5",
            dtype="fp32",
            vocabulary=128256,
            ours="recompute",
            measure="memory",
            chunk_tokens=256,
            gate=0.065,
            rounds=1,
        ),
        Case("C6", keep_fraction=1.0, gate=1.05),
        Case("C7", peer="torch-lce", gate=0.13),
        Case("G1", **G1, ours="recompute", gate=0.72),
        Case("G1-keep", **G1, ours="keep", gate=0.62),
        Case("G1-liger", **G1, ours="recompute", peer="liger", gate=0.72),
        Case("G1-keep-liger", **G1, ours="keep", peer="liger", gate=0.58),
        Case("G1-engine", **G1, ours="liger", peer="liger", gate=0.72),
        Case("G2", **G2, ours="recompute", gate=0.65),
        Case("G2-fused", **G2, ours="recompute", peer="megatron-fused", gate=0.75),
        Case("G3", **G3, ours="recompute", gate=0.73),
        Case("G4", **G3, ours="recompute", measure="memory", main_grad=True, gate=0.2),
        Case("G4-keep", **G3, ours="keep", measure="memory", main_grad=True, gate=0.45),
        Case("G5", **G1, ours="known", gate=0.52),
    )
}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    missed = 0
    for case in _cases(options, device):
        try:
            row = run_case(case, device, options)
        except Unavailable as why:
            row = {"case": case.name, "ours": case.ours, "peer": case.peer, "skipped": str(why)}
        missed += row.get("missed", False)
        print(json.dumps(row), flush=True)
        release_memory(device)
    return 1 if missed else 0


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> dict:
    """Measure one case; the returned row is what is printed."""
    problem = Problem.make(
        case.tokens,
        case.hidden,
        case.vocabulary,
        case.dtype,
        case.keep_fraction,
        device,
        case.main_grad,
    )
    ours, peer = contenders(problem, case.ours, case.peer, case.chunk_tokens, options.elementwise)
    sides = {"ours": ours, "peer": peer}
    row = {
        "case": case.name,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "vocabulary": case.vocabulary,
        "dtype": case.dtype,
        "k": case.keep_fraction,
        "ours": case.ours,
        "peer": case.peer,
        "measure": case.measure,
        "main_grad": case.main_grad,
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": options.threads,
    }
    correct = True
    if options.check:
        row["errors"] = _errors_of_both(case, device)
        correct = _acceptable(row["errors"], case)
    if case.measure == "memory":
        figures, ratio = _memory(sides, problem, device)
    else:
        clock = "cuda" if device.type == "cuda" else options.clock
        figures, ratio = _time(sides, clock, options.rounds or case.rounds)
    missed = not correct or (case.gate is not None and ratio > case.gate * GATE_SLACK)
    return row | figures | {"gate": case.gate, "correct": correct, "missed": missed}


def _memory(sides: dict[str, Side], problem: Problem, device: torch.device) -> tuple[dict, float]:
    """(figures to print, ratio) of the peak memory less the weight gradient, which both hold."""
    extra_bytes = {
        name: peak_extra_bytes(side, device) - problem.weight_gradient_bytes
        for name, side in sides.items()
    }
    figures = {f"{name}_mib": round(value / 2**20, 1) for name, value in extra_bytes.items()}
    ratio = extra_bytes["ours"] / extra_bytes["peer"]
    return figures | {"ratio": round(ratio, 4)}, ratio


def _time(sides: dict[str, Side], clock: str, rounds: int) -> tuple[dict, float]:
    """(figures to print, ratio of the medians)."""
    times = seconds_per_call(sides, clock, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    least = {name: min(values) for name, values in times.items()}
    ratio = median["ours"] / median["peer"]
    figures = {
        "ours_median_seconds": round(median["ours"], 6),
        "peer_median_seconds": round(median["peer"], 6),
        "ours_min_seconds": round(least["ours"], 6),
        "peer_min_seconds": round(least["peer"], 6),
        "clock": clock,
        "rounds": len(times["ours"]),
        "ratio": round(ratio, 3),
        "ratio_of_minima": round(least["ours"] / least["peer"], 3),
    }
    return figures, ratio


def _errors_of_both(case: Case, device: torch.device) -> dict[str, dict[str, float]]:
    """Of ours and the peer, on a narrow copy of the problem.

    fp64 over the whole vocabulary of the largest cases would not fit.
    """
    hidden, vocabulary = min(case.hidden, 256), min(case.vocabulary, 8000)
    small = Problem.make(
        256, hidden, vocabulary, case.dtype, case.keep_fraction, device, case.main_grad
    )
    ours, peer = contenders(small, case.ours, case.peer, 64)
    return {"ours": _errors(small, ours), "peer": _errors(small, peer)}


def _errors(problem: Problem, side: Side) -> dict[str, float]:
    """Relative distance of loss (rms, nats) and gradients from fp64 of the same operands."""
    reference = problem.truth()
    values = side()
    kept_N = problem.mask_N != 0  # a selection known beforehand has no other losses
    loss, d_hidden, d_weight = (
        value.double() - exact for value, exact in zip(values, reference, strict=True)
    )
    return {
        "loss_rms": _three_digits(loss[kept_N].square().mean().sqrt()),
        "d_hidden": _three_digits(d_hidden.norm() / reference[1].norm()),
        "d_weight": _three_digits(d_weight.norm() / reference[2].norm()),
    }


def _three_digits(value: torch.Tensor) -> float:
    return float(f"{value.item():.2e}")


def _acceptable(errors: dict[str, dict[str, float]], case: Case) -> bool:
    """Whether ours is as exact as it must be.

    fp32 within 1e-5. bf16: losses from fp32 sums, five times closer to fp64 than those of a peer
    that rounds them, and gradients no further from it than the peer's.
    """
    ours, peer = errors["ours"], errors["peer"]
    if case.dtype == "fp32":
        return max(ours.values()) < 1e-5
    fair = case.peer != "megatron-widened"  # the widened peer is exact too
    loss_good = ours["loss_rms"] < 1e-5 and (not fair or ours["loss_rms"] <= peer["loss_rms"] / 5)
    return loss_good and all(
        ours[name] <= max(peer[name], 4e-3) for name in ("d_hidden", "d_weight")
    )


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    if options.case == "all":
        kind = "G" if device.type == "cuda" else "C"
        chosen = [case for name, case in CASES.items() if name.startswith(kind)]
    elif options.case:
        names = options.case.split(",")
        if unknown := [name for name in names if name not in CASES]:
            raise SystemExit(f"unknown case {unknown[0]}; choose from {', '.join(CASES)} or all")
        chosen = [CASES[name] for name in names]
    else:
        chosen = [Case("custom")]
    changes = {
        "tokens": options.n,
        "hidden": options.hidden,
        "vocabulary": options.vocab,
        "dtype": options.dtype,
        "keep_fraction": options.k,
        "ours": "known" if options.selection == "known" else options.mode,
        "peer": options.peer,
        "chunk_tokens": options.chunk,
        "measure": "memory" if options.memory else None,
        "main_grad": options.main_grad or None,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return [replace(case, **changes) for case in chosen]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        help="named cases (C1..C7, G1..G5), commas between them, or all; the options below then "
        "override the shape",
    )
    parser.add_argument("--n", type=int, help="tokens")
    parser.add_argument("--hidden", type=int, help="hidden size")
    parser.add_argument("--vocab", type=int, help="vocabulary size")
    parser.add_argument("--dtype", choices=["fp32", "bf16"])
    parser.add_argument("--k", type=float, help="kept fraction of the tokens")
    parser.add_argument(
        "--mode",
        choices=["auto", "keep", "recompute", "liger"],
        help="how ours computes; liger: with Liger's kernels",
    )
    parser.add_argument(
        "--selection",
        choices=["late", "known"],
        default="late",
        help="known: the kept rows are given before the head",
    )
    parser.add_argument(
        "--peer", choices=["megatron", "megatron-fused", "megatron-widened", "torch-lce", "liger"]
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="compare peak memory above inputs and weight gradient instead of time",
    )
    parser.add_argument(
        "--main-grad",
        action="store_true",
        help="add the weight's gradient to an fp32 buffer beside the weight, as training does",
    )
    parser.add_argument("--chunk", type=int, help="chunk_tokens of ours")
    parser.add_argument(
        "--elementwise", default="auto", choices=["auto", "eager", "compiled", "triton"]
    )
    parser.add_argument("--rounds", type=int, help="interleaved rounds; default by case")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="skip the comparison with fp64"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
