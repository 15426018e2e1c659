"""The loss head beside its peers: time, memory and accuracy, in one process, in interleaved rounds.

    python -m benchmarks.head --case C1                      # a named case with its gate
    python -m benchmarks.head --case all                     # C1 to C7 on CPU, G1 to G5 where there is CUDA
    python -m benchmarks.head --n 2048 --hidden 512 --vocab 32000 --dtype fp32 --k 0.6 --mode keep --peer megatron

Each round runs ours and the peer once, forward and backward, on the same tensors. One JSON line per case: medians, minima, and the
ratio ours / peer of medians and of minima. The selected rows' gradients are compared with fp64 first (`--no-check` skips it), and
a wrong gradient fails the case whatever its speed. Exit code 1 when a gate is missed by more than 3 %.
The gates (C1 …, G1 …) are defined at the head of benchmarks/RESULTS.md.

Peers: `megatron`         megatron-core's head: weight product, vocab_parallel_cross_entropy, masked loss, backward;
       `megatron-fused`   the same with fused_vocab_parallel_cross_entropy;
       `megatron-widened` the same on fp32 copies of bf16 operands, made inside the timed region: the stronger peer on a CPU without
                          bf16 units, where torch's bf16 products are many times slower than widening;
       `torch-lce`        torch.nn.functional.linear_cross_entropy(reduction="none");
       `liger`            Liger-Kernel's fused per-token cross entropy: its Hopper kernels where there is one, else its chunked torch.

CPU time of one thread by default (`--clock cpu`), which other work on the machine disturbs least; `--clock wall --threads N` on an idle one.
On CUDA the clock is CUDA events.
"""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import dataclass, replace

import torch

from benchmarks.head_peers import Problem, contenders
from benchmarks.measure import peak_extra_bytes, seconds_per_call

GATE_SLACK = 1.03


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
    gate: float | None = None
    rounds: int = 3


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
        Case(
            "G1",
            tokens=8192,
            hidden=4096,
            vocabulary=131072,
            ours="recompute",
            gate=0.75,
            rounds=50,
        ),
        Case(
            "G1-keep",
            tokens=8192,
            hidden=4096,
            vocabulary=131072,
            ours="keep",
            gate=0.62,
            rounds=50,
        ),
        Case(
            "G1-liger",
            tokens=8192,
            hidden=4096,
            vocabulary=131072,
            ours="recompute",
            peer="liger",
            gate=0.72,
            rounds=50,
        ),
        Case(
            "G1-keep-liger",
            tokens=8192,
            hidden=4096,
            vocabulary=131072,
            ours="keep",
            peer="liger",
            gate=0.58,
            rounds=50,
        ),
        Case(
            "G1-engine",
            tokens=8192,
            hidden=4096,
            vocabulary=131072,
            ours="liger",
            peer="liger",
            gate=0.72,
            rounds=50,
        ),
        Case("G2", tokens=16384, hidden=2048, ours="recompute", gate=0.65, rounds=50),
        Case(
            "G2-fused",
            tokens=16384,
            hidden=2048,
            ours="recompute",
            peer="megatron-fused",
            gate=0.80,
            rounds=50,
        ),
        Case(
            "G3",
            tokens=8192,
            hidden=4096,
            vocabulary=128256,
            ours="recompute",
            gate=0.76,
            rounds=50,
        ),
        Case(
            "G4",
            tokens=8192,
            hidden=4096,
            vocabulary=128256,
            ours="recompute",
            measure="memory",
            gate=0.2,
            rounds=1,
        ),
        Case(
            "G4-keep",
            tokens=8192,
            hidden=4096,
            vocabulary=128256,
            ours="keep",
            measure="memory",
            gate=0.45,
            rounds=1,
        ),
        Case("G5", tokens=8192, hidden=4096, vocabulary=131072, ours="known", gate=0.50, rounds=50),
    )
}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    missed = 0
    for case in _cases(options, device):
        row = run_case(case, device, options)
        missed += row["missed"]
        print(json.dumps(row), flush=True)
    return 1 if missed else 0


def run_case(case: Case, device: torch.device, options: argparse.Namespace) -> dict:
    """Measure one case; the returned row is what is printed."""
    problem = Problem.make(
        case.tokens, case.hidden, case.vocabulary, case.dtype, case.keep_fraction, device
    )
    ours, peer = contenders(problem, case.ours, case.peer, case.chunk_tokens, options.elementwise)
    row = {
        "case": case.name,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "vocabulary": case.vocabulary,
        "dtype": case.dtype,
    }
    row |= {"k": case.keep_fraction, "ours": case.ours, "peer": case.peer, "measure": case.measure}
    row |= {"device": _device_name(device), "torch": torch.__version__, "threads": options.threads}
    correct = True
    if options.check:
        # A narrow copy of the problem: fp64 over the whole vocabulary of the largest cases would not fit.
        small = Problem.make(
            256,
            min(case.hidden, 256),
            min(case.vocabulary, 8000),
            case.dtype,
            case.keep_fraction,
            device,
        )
        row["errors"] = {
            name: _errors(small, side)
            for name, side in zip(
                ("ours", "peer"), contenders(small, case.ours, case.peer, 64), strict=True
            )
        }
        correct = _acceptable(row["errors"], case)
    if case.measure == "memory":
        values = {
            name: peak_extra_bytes(side, device) - problem.weight_gradient_bytes
            for name, side in (("ours", ours), ("peer", peer))
        }
        row |= {f"{name}_mib": round(value / 2**20, 1) for name, value in values.items()}
        ratio = values["ours"] / values["peer"]
        row["ratio"] = round(ratio, 4)
    else:
        clock = "cuda" if device.type == "cuda" else options.clock
        times = seconds_per_call(
            {"ours": ours, "peer": peer}, clock, rounds=options.rounds or case.rounds
        )
        row |= {
            f"{name}_median_seconds": round(statistics.median(values), 4)
            for name, values in times.items()
        }
        row |= {f"{name}_min_seconds": round(min(values), 4) for name, values in times.items()}
        ratio = row["ours_median_seconds"] / row["peer_median_seconds"]
        row |= {"clock": clock, "rounds": len(times["ours"]), "ratio": round(ratio, 3)}
        row["ratio_of_minima"] = round(row["ours_min_seconds"] / row["peer_min_seconds"], 3)
    row |= {
        "gate": case.gate,
        "missed": not correct or (case.gate is not None and ratio > case.gate * GATE_SLACK),
    }
    return row


def _errors(problem: Problem, side) -> dict[str, float]:
    """Relative distance of loss (rms, nats) and gradients from fp64 of the same operands."""
    reference, got = problem.truth(), side()
    kept_N = problem.mask_N != 0  # a selection known beforehand has no other losses
    return {
        "loss_rms": float(
            f"{(got[0].double() - reference[0])[kept_N].square().mean().sqrt().item():.2e}"
        ),
        "d_hidden": float(
            f"{((got[1].double() - reference[1]).norm() / reference[1].norm()).item():.2e}"
        ),
        "d_weight": float(
            f"{((got[2].double() - reference[2]).norm() / reference[2].norm()).item():.2e}"
        ),
    }


def _acceptable(errors: dict[str, dict[str, float]], case: Case) -> bool:
    """fp32 within 1e-5; bf16 losses from fp32 sums, five times closer than a peer that rounds them; gradients no further than the peer's."""
    ours, peer = errors["ours"], errors["peer"]
    if case.dtype == "fp32":
        return max(ours.values()) < 1e-5
    fair = case.peer != "megatron-widened"  # the widened peer is exact too
    loss_good = ours["loss_rms"] < 1e-5 and (not fair or ours["loss_rms"] <= peer["loss_rms"] / 5)
    return loss_good and all(
        ours[name] <= max(peer[name], 4e-3) for name in ("d_hidden", "d_weight")
    )


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    kind = "G" if device.type == "cuda" else "C"
    names = (
        [name for name in CASES if name.startswith(kind)]
        if options.case == "all"
        else [options.case]
        if options.case
        else []
    )
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown case {unknown[0]}; choose from {', '.join(CASES)} or all")
    chosen = [CASES[name] for name in names] or [Case("custom")]
    changes = {
        "tokens": options.n,
        "hidden": options.hidden,
        "vocabulary": options.vocab,
        "dtype": options.dtype,
        "keep_fraction": options.k,
    }
    changes |= {
        "ours": "known" if options.selection == "known" else options.mode,
        "peer": options.peer,
        "chunk_tokens": options.chunk,
    }
    changes |= {"measure": "memory" if options.memory else None}
    return [
        replace(case, **{name: value for name, value in changes.items() if value is not None})
        for case in chosen
    ]


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        help="a named case (C1..C7, G1..G5) or all; the options below then override its shape",
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
