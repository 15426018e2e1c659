"""RMSNorm, SwiGLU and rotary embedding: the Triton passes beside what they replace.

    python -m benchmarks.layer_passes --case all       # on a GPU
    python -m benchmarks.layer_passes --case norm      # or swiglu, rotary
    python -m benchmarks.layer_passes --case all --smoke --device cpu    # plain torch, tiny

A call is forward and backward at TinyLlama-1.1B's shape, 8 x 2048 tokens, bf16. `ours` is
megatron_slm.ops.layer_passes; `peer` is the code of the torch-native layers with
device.fused_layers: none: torch's RMSNorm on fp32 copies, megatron-core's compiled SwiGLU, its
split and rotary embedding; `apex` is apex's RMSNorm, where it is built. Medians of interleaved
rounds, one JSON line per case, with the bytes that the pass must move per second of its time as a
share of the device's copy rate. Results are compared with fp64 on the first 64 tokens: exit code 1
when ours are further away than the peer's. Not yet run on GPU; there is no gate before it was.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import device_name, seconds_per_call
from megatron_slm.accelerations import apex_rms_norm
from megatron_slm.device import choose_device
from megatron_slm.ops import layer_passes

TOKENS, SEQUENCES, HIDDEN, FEATURES, GROUPS, QUERIES, SIZE = 2048, 8, 2048, 5632, 4, 8, 64
EPSILON = 1e-5
Pass = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """One pass: its operands, its contenders, and what it computes exactly."""

    operands: tuple[Tensor, ...]
    sides: dict[str, Pass]
    exact: Pass
    moved_bytes: int
    """Read and written by a forward and a backward that touch every value once."""


def norm(tokens: int, device: torch.device) -> Problem:
    hidden = _random(device, tokens, SEQUENCES, HIDDEN)
    weight = _random(device, HIDDEN)
    sides: dict[str, Pass] = {
        "ours": lambda x, w: layer_passes.rms_norm(x, w, EPSILON),
        "peer": lambda x, w: layer_passes.plain_rms_norm(x, w, EPSILON),
    }
    if device.type == "cuda" and (apex := apex_rms_norm()) is not None:
        sides["apex"] = lambda x, w: apex(x, w, (HIDDEN,), EPSILON)
    return Problem(
        (hidden, weight),
        sides,
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * w,
        5 * hidden.nbytes,
    )


def swiglu(tokens: int, device: torch.device) -> Problem:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    joint = _random(device, tokens, SEQUENCES, 2 * FEATURES)
    peer: Pass = layer_passes.plain_swiglu
    if device.type == "cuda":  # compiling for a CPU would need a compiler
        peer = lambda x: bias_swiglu_impl(x, None)  # noqa: E731
    return Problem(
        (joint,),
        {"ours": layer_passes.swiglu, "peer": peer},
        lambda x: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[0] * x.chunk(2, -1)[1],
        4 * joint.nbytes,
    )


def rotary(tokens: int, device: torch.device) -> Problem:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    mixed = _random(device, tokens, SEQUENCES, GROUPS, (QUERIES + 2) * SIZE)
    frequency = 10000.0 ** (-torch.arange(0, SIZE, 2, device=device) / SIZE)
    half = torch.outer(torch.arange(tokens, device=device).float(), frequency)
    angle = half.repeat(1, 2)[:, None, None]

    def megatron(mixed: Tensor) -> tuple[Tensor, ...]:
        table = angle[: len(mixed)].to(mixed.dtype if mixed.dtype == torch.float64 else angle.dtype)
        query, key, value = mixed.split([QUERIES * SIZE, SIZE, SIZE], dim=3)
        query = query.reshape(*mixed.shape[:2], -1, SIZE)
        turned = (_apply_rotary_pos_emb_bshd(heads, table) for heads in (query, key))
        return (*turned, value)

    def ours(mixed: Tensor) -> tuple[Tensor, ...]:
        angle_SP = half[: len(mixed)]
        return layer_passes.split_rotary(mixed, angle_SP.cos(), angle_SP.sin())

    return Problem((mixed,), {"ours": ours, "peer": megatron}, megatron, 4 * mixed.nbytes)


CASES = {"norm": norm, "swiglu": swiglu, "rotary": rotary}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    device = choose_device(options.device).torch_device
    names = list(CASES) if options.case == "all" else options.case.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown case {unknown[0]}; choose from {', '.join(CASES)} or all")
    tokens = 64 if options.smoke else TOKENS
    bytes_per_second = _copy_rate(device)
    wrong = False
    for name in names:
        problem = CASES[name](tokens, device)
        row = {"case": name, "device": device_name(device)}
        row |= _times(problem, device, options.rounds, bytes_per_second) | _errors(problem)
        # There is no gate on the time before it was measured on a GPU; exactness has one.
        row |= {"measure": "time", "gate": None, "missed": not row["correct"]}
        wrong = wrong or row["missed"]
        print(json.dumps(row), flush=True)
    return 1 if wrong else 0


def _times(
    problem: Problem, device: torch.device, rounds: int, bytes_per_second: float
) -> dict[str, float]:
    calls = {
        name: _forward_and_backward(function, problem.operands)
        for name, function in problem.sides.items()
    }
    taken = seconds_per_call(calls, "cuda" if device.type == "cuda" else "cpu", rounds)
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    figures = {f"{name}_median_seconds": value for name, value in median.items()}
    figures["ratio"] = round(median["ours"] / median["peer"], 3)
    figures["share_of_copy_rate"] = round(
        problem.moved_bytes / median["ours"] / bytes_per_second, 3
    )
    return figures


def _forward_and_backward(function: Pass, operands: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = tuple(value.detach().requires_grad_() for value in operands)
    upstream = [torch.ones_like(value) for value in _tuple(function(*leaves))]
    return lambda: torch.autograd.grad(_tuple(function(*leaves)), leaves, upstream)


def _errors(problem: Problem) -> dict[str, object]:
    """The largest relative distance of a result or gradient from fp64."""
    operands = tuple(value[:64] if value.dim() > 1 else value for value in problem.operands)
    exact = _results(problem.exact, tuple(value.double() for value in operands))
    found = {
        name: _distance(_results(function, operands), exact)
        for name, function in problem.sides.items()
    }
    errors = {f"{name}_error": float(f"{value:.2e}") for name, value in found.items()}
    return errors | {"correct": found["ours"] <= 1.1 * found["peer"]}


def _distance(values: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(values, exact, strict=True)
    return max(((value.double() - true).norm() / true.norm()).item() for value, true in pairs)


def _results(function: Pass, operands: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = tuple(value.detach().requires_grad_() for value in operands)
    outputs = _tuple(function(*leaves))
    gradients = torch.autograd.grad(outputs, leaves, [value.detach() for value in outputs])
    return [*outputs, *gradients]


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).bfloat16()


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    clock = "cuda" if device.type == "cuda" else "cpu"
    taken = seconds_per_call({"copy": lambda: target.copy_(source)}, clock, 5)
    return 2 * source.nbytes / statistics.median(taken["copy"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_passes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", default="all", help=f"{', '.join(CASES)} or all")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="64 tokens a sequence")
    return parser


if __name__ == "__main__":
    sys.exit(main())
