"""How the head will compute: one frozen plan per call, made from sizes and device alone, so it can be printed and tested.

Legend: N tokens, V vocabulary columns of this tensor rank, C rows of one chunk.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Mode = Literal["auto", "recompute", "keep"]
Elementwise = Literal["auto", "eager", "compiled", "triton"]
Engine = Literal["torch", "liger"]

KEPT_BUDGET_BYTES = 2 << 30
"""Default ceiling of what `mode="auto"` keeps per call: an 8192-token micro-batch over 128256 columns in bf16 just fits."""

_COMPILED_PAYS_ABOVE_LOGITS = 1 << 26


@dataclass(frozen=True)
class HeadPlan:
    """The choices of one call. `print(plan)` tells what will run."""

    mode: Literal["recompute", "keep"]
    """keep = exp(logits - row maximum) is held from forward to backward; recompute = logits are computed again for kept rows."""
    matmul: Literal["direct", "widened", "widened_bf16_units", "fp32_output"]
    """How a product of low-precision operands gets an fp32 result; see matmul.py. direct = the operands are fp32."""
    elementwise: Literal["eager", "compiled", "triton"]
    chunk_tokens: int
    """Rows whose fp32 logits exist at once: chunk_tokens * V * 4 bytes of scratch."""
    gradient_chunk_tokens: int
    """Rows of one weight-gradient product; each product reads and writes the whole fp32 weight gradient once."""
    kept_dtype: torch.dtype
    kept_bytes: int
    """What keep mode would hold for all N rows, from forward to backward."""
    spare_bytes: int = 0
    """What the budget has left beside the kept logits: a widened copy of the weight stays for backward when it fits in."""
    engine: Engine = "torch"
    """Who computes backward: chunked torch products, or Liger's Hopper kernel (liger_engine.py)."""


def plan_head(
    tokens: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    mode: Mode = "auto",
    kept_budget_bytes: int = KEPT_BUDGET_BYTES,
    chunk_tokens: int | None = None,
    elementwise: Elementwise = "auto",
    engine: Engine = "torch",
    will_backward: bool = True,
) -> HeadPlan:
    """The plan for `tokens` rows over `columns` vocabulary columns of this rank; a pure function of its arguments and the machine.

    mode auto keeps while the kept bytes fit `kept_budget_bytes`, and never when no backward follows.
    chunk_tokens None = on CPU 1024 rows (512 when recomputing, 256 when no backward follows); on GPU a sixteenth of the tokens within 256 MiB of logits.
    engine "liger" recomputes: mode keep cannot be had with it. Whether it can run here at all, liger_engine.check_liger tells.
    ValueError names any argument outside its choices, and a compiled or Triton request this machine cannot honour.
    """
    _check_choice("mode", mode, ("auto", "recompute", "keep"))
    _check_choice("elementwise", elementwise, ("auto", "eager", "compiled", "triton"))
    _check_choice("engine", engine, ("torch", "liger"))
    if engine == "liger" and mode == "keep":
        raise ValueError(
            "mode is 'keep' with engine 'liger', which keeps nothing and recomputes; use mode 'auto', or engine 'torch'."
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens is {chunk_tokens}; it must be at least 1 (or None to let the plan choose)."
        )
    matmul = _matmul(dtype, device)
    # Where products take fp32 operands anyway, keeping bf16 would cost a conversion each way and save memory only.
    kept_dtype = torch.bfloat16 if matmul == "fp32_output" else torch.float32
    kept_bytes = tokens * columns * kept_dtype.itemsize
    if not will_backward or engine == "liger":
        mode = "recompute"
    elif mode == "auto":
        mode = "keep" if kept_bytes <= kept_budget_bytes else "recompute"
    chunk = max(
        1,
        min(
            chunk_tokens or _usual_chunk_tokens(tokens, columns, device, mode, will_backward),
            tokens,
        ),
    )
    # With fp32 results the gradient rows have memory of their own, half as wide as logits. Each weight product reads and writes dW
    # once, 735 / rows of the product's own time on an H200 (8 H V bytes against 2 rows H V operations): so, many rows at a time.
    gradient_chunk = 6 * chunk if matmul == "fp32_output" else chunk
    if mode == "keep" and kept_dtype == (dtype if matmul == "fp32_output" else torch.float32):
        gradient_chunk = max(
            tokens, 1
        )  # the kept values become the gradient rows in their own memory
    return HeadPlan(
        mode,
        matmul,
        _elementwise(elementwise, tokens * columns, device, matmul),
        chunk,
        gradient_chunk,
        kept_dtype,
        kept_bytes,
        kept_budget_bytes - kept_bytes,
        engine,
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def _usual_chunk_tokens(
    tokens: int, columns: int, device: torch.device, mode: str, will_backward: bool
) -> int:
    if device.type != "cuda":
        # 512 rows reach the speed of more (of the weight product above all: forward alone is as fast, within 2 %, with 256 rows and half
        # the memory); with exponentials kept in place, 1024 cost no memory and are a little faster.
        return 1024 if mode == "keep" else 512 if will_backward else 256
    # Logits of a sixteenth of the rows (and gradients of six sixteenths, half as wide) are a sixth of Megatron's 6 bytes per logit.
    fitting = (256 << 20) // (4 * max(columns, 1))
    return max(256, min(-(-tokens // 16), fitting, 4096) // 128 * 128)


def _matmul(dtype: torch.dtype, device: torch.device) -> str:
    if dtype == torch.float32:
        return "direct"
    if device.type == "cuda" and _has_fp32_output():
        return "fp32_output"
    return (
        "widened_bf16_units"
        if device.type == "cpu" and dtype == torch.bfloat16 and cpu_has_bf16_units()
        else "widened"
    )


def _elementwise(asked: Elementwise, logits: int, device: torch.device, matmul: str) -> str:
    if asked == "triton" and not (device.type == "cuda" and has_triton()):
        raise ValueError(
            f"elementwise='triton' needs CUDA tensors and the triton package; the tensors are on {device.type}. Use 'auto'."
        )
    if asked == "compiled" and not has_compiler():
        raise ValueError(
            "elementwise='compiled' needs a C++ compiler on the PATH and none was found. Install g++, or use 'auto'."
        )
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "triton" if has_triton() else "eager"
    # Compiling takes seconds. It pays only where matrix units make the products so fast that the passes over logits show.
    worth_it = matmul == "widened_bf16_units" and logits >= _COMPILED_PAYS_ABOVE_LOGITS
    return "compiled" if worth_it and has_compiler() else "eager"


def cpu_has_bf16_units() -> bool:
    """True where oneDNN computes fp32 products with bf16 units when allowed to: AMX.

    With AVX512_BF16 alone (AMD EPYC Zen 4 or later) the permission changed nothing: 97 to 106 GFLOP/s with it, 94 to 98 without.
    """
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


@cache
def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


@cache
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _has_fp32_output() -> bool:
    return (
        "dtype_out" in torch.ops.aten.mm.overloads()
        and "dtype_out" in torch.ops.aten.addmm.overloads()
    )
