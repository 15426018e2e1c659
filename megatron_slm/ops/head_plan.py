"""How one call of the head computes: a frozen plan, made from sizes and device alone.

Because the plan depends on nothing else, it can be printed and tested without running the head.

Legend: N tokens, H hidden, V vocabulary columns of this tensor rank.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

Mode = Literal["auto", "recompute", "keep"]
Elementwise = Literal["auto", "eager", "compiled", "triton"]
Engine = Literal["torch", "liger"]
PlannedMode = Literal["recompute", "keep"]
PlannedElementwise = Literal["eager", "compiled", "triton"]
Matmul = Literal["direct", "widened", "widened_bf16_units", "fp32_output"]

KEPT_BUDGET_BYTES = 2 << 30
"""What `mode="auto"` keeps per call at most, by default.

In bf16, an 8192-token micro-batch over 128256 columns just fits.
"""

_COMPILED_PAYS_ABOVE_LOGITS = 1 << 26


@dataclass(frozen=True)
class HeadPlan:
    """The choices of one call. `print(plan)` shows what will run."""

    mode: PlannedMode
    """keep holds exp(logits - row maximum) from forward to backward.
    recompute computes the logits of the kept rows a second time in backward."""
    matmul: Matmul
    """How a product of low-precision operands gets an fp32 result: see matmul.py.
    direct means that the operands are fp32."""
    elementwise: PlannedElementwise
    chunk_tokens: int
    """Rows whose fp32 logits exist at once: chunk_tokens * V * 4 bytes of scratch memory."""
    gradient_chunk_tokens: int
    """Rows of one weight-gradient product.
    Each product reads and writes the whole fp32 weight gradient once."""
    kept_dtype: torch.dtype
    kept_bytes: int
    """What keep mode would hold for all N rows, from forward to backward."""
    spare_bytes: int = 0
    """What the budget has left beside the kept logits.
    A widened copy of the weight stays for backward when it fits into this."""
    engine: Engine = "torch"
    """What computes backward: chunked torch products, or Liger's Hopper kernel."""


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
    """The plan for `tokens` rows over `columns` vocabulary columns of this rank.

    A pure function of its arguments and the machine. Mode auto keeps while the kept bytes fit
    `kept_budget_bytes`, and never when no backward follows. Without chunk_tokens a CPU takes 1024
    rows (512 when recomputing, 256 when no backward follows), and a GPU a sixteenth of the tokens
    within 256 MiB of logits. Engine "liger" recomputes; liger_engine.check_liger checks whether it
    can run here at all.

    ValueError names any argument outside its choices, and a compiled or Triton request that this
    machine cannot honour.
    """
    _check_arguments(mode, elementwise, engine, chunk_tokens)
    matmul = _matmul(dtype, device)
    # Where products take fp32 operands anyway, keeping bf16 would save memory only, and cost a
    # conversion each way.
    kept_dtype = torch.bfloat16 if matmul == "fp32_output" else torch.float32
    kept_bytes = tokens * columns * kept_dtype.itemsize
    if not will_backward or engine == "liger":
        planned_mode: PlannedMode = "recompute"
    elif mode == "auto":
        planned_mode = "keep" if kept_bytes <= kept_budget_bytes else "recompute"
    else:
        planned_mode = mode
    if not chunk_tokens:
        chunk_tokens = _usual_chunk_tokens(tokens, columns, device, planned_mode, will_backward)
    chunk_tokens = max(1, min(chunk_tokens, tokens))
    return HeadPlan(
        planned_mode,
        matmul,
        _elementwise(elementwise, tokens * columns, device, matmul),
        chunk_tokens,
        _gradient_chunk_tokens(tokens, chunk_tokens, planned_mode, matmul, dtype),
        kept_dtype,
        kept_bytes,
        kept_budget_bytes - kept_bytes,
        engine,
    )


def _check_arguments(mode: str, elementwise: str, engine: str, chunk_tokens: int | None) -> None:
    _check_choice("mode", mode, get_args(Mode))
    _check_choice("elementwise", elementwise, get_args(Elementwise))
    _check_choice("engine", engine, get_args(Engine))
    if engine == "liger" and mode == "keep":
        raise ValueError(
            "mode is 'keep' with engine 'liger', which keeps nothing and recomputes; "
            "use mode 'auto', or engine 'torch'."
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens is {chunk_tokens}; "
            "it must be at least 1 (or None to let the plan choose)."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def _usual_chunk_tokens(
    tokens: int, columns: int, device: torch.device, mode: PlannedMode, will_backward: bool
) -> int:
    if device.type == "cuda":
        # Logits of a sixteenth of the rows (and gradients of six sixteenths, half as wide) are a
        # sixth of the 6 bytes per logit that megatron-core's head holds.
        fitting = (256 << 20) // (4 * max(columns, 1))
        return max(256, min(-(-tokens // 16), fitting, 4096) // 128 * 128)
    if mode == "keep":
        # The exponentials are kept in place, so more rows cost no memory, and are a little faster.
        return 1024
    # 512 rows are as fast as more, above all in the weight product. Forward alone is as fast,
    # within 2 %, with 256 rows and half the memory.
    return 512 if will_backward else 256


def _gradient_chunk_tokens(
    tokens: int, chunk_tokens: int, mode: PlannedMode, matmul: Matmul, dtype: torch.dtype
) -> int:
    """Rows of one weight-gradient product."""
    if matmul == "fp32_output":
        if mode == "keep" and dtype == torch.bfloat16:
            return max(tokens, 1)  # the kept values become the gradient rows, in their own memory
        # The gradient rows have memory of their own, half as wide as logits. Each weight product
        # reads and writes the weight gradient once, which takes 735 / rows of the product's own
        # time on an H200 (8 H V bytes against 2 rows H V operations): hence many rows at a time.
        return 6 * chunk_tokens
    return max(tokens, 1) if mode == "keep" else chunk_tokens


def _matmul(dtype: torch.dtype, device: torch.device) -> Matmul:
    if dtype == torch.float32:
        return "direct"
    if device.type == "cuda" and _has_fp32_output():
        return "fp32_output"
    if device.type == "cpu" and dtype == torch.bfloat16 and cpu_has_bf16_units():
        return "widened_bf16_units"
    return "widened"


def _elementwise(
    requested: Elementwise, logits: int, device: torch.device, matmul: Matmul
) -> PlannedElementwise:
    if requested == "triton" and not (device.type == "cuda" and has_triton()):
        raise ValueError(
            "elementwise='triton' needs CUDA tensors and the triton package; "
            f"the tensors are on {device.type}. Use 'auto'."
        )
    if requested == "compiled" and not has_compiler():
        raise ValueError(
            "elementwise='compiled' needs a C++ compiler on the PATH and none was found. "
            "Install g++, or use 'auto'."
        )
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "triton" if has_triton() else "eager"
    # Compiling takes seconds. That pays only where matrix units make the products so fast that
    # the time of the passes over the logits is noticed.
    worth_it = matmul == "widened_bf16_units" and logits >= _COMPILED_PAYS_ABOVE_LOGITS
    return "compiled" if worth_it and has_compiler() else "eager"


def cpu_has_bf16_units() -> bool:
    """True where oneDNN computes fp32 products with bf16 units when allowed to: AMX.

    With AVX512_BF16 alone (AMD EPYC Zen 4 or later) the permission changed nothing: 97 to 106
    GFLOP/s with it, 94 to 98 without.
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
