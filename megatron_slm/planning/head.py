"""Memory and work of the selective head.

The choices are those of ops/head_plan.py, which needs torch; a test holds the two together.

N tokens of a micro-batch, V vocabulary columns of a tensor rank, H hidden, C rows of a chunk.
"""

from dataclasses import dataclass

from megatron_slm.planning.job import Job

KEPT_BUDGET_BYTES = 2 << 30


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of one call on one rank of the last stage."""

    mode: str
    """keep or recompute, as docs/head.md describes them."""
    kept_bytes: int
    """From forward to backward: one value per logit (keep), or three fp32 numbers per token."""
    scratch_bytes: int
    """The larger of forward's and backward's scratch."""


def head_memory(job: Job) -> HeadMemory:
    """What one micro-batch's head holds and uses, for `mode="auto"`.

    keep: one value per logit while that fits 2 GiB: 2 bytes in bf16 on a GPU, 4 in fp32. Scratch in
    forward: C·V fp32 logits. In backward of bf16 on a GPU: gradient rows, 6C·V of 2 bytes unless
    the kept values are overwritten in place, beside the logits when they are computed again. The
    weight's gradient V·H is added to main_grad on a GPU, where autograd gets a placeholder of the
    weight's type; on a CPU it is made in fp32 and cast to that type.
    """
    tokens, columns, hidden = job.rank_tokens, job.head_columns, job.config.model.hidden_size
    low = job.config.device.precision != "fp32"
    kept = tokens * columns * (2 if low else 4)
    mode = "keep" if kept <= KEPT_BUDGET_BYTES else "recompute"
    chunk = min(chunk_tokens(tokens, columns), tokens)
    logits = 4 * chunk * columns
    # What is kept is bf16 in an fp16 run too, so its fp16 gradient cannot be written over it.
    in_place = mode == "keep" and job.config.device.precision != "fp16"
    gradient_rows = 0
    if not in_place:
        gradient_rows = min(6 * chunk, tokens) * columns * 2 if low else logits
    again = logits if mode == "recompute" and low else 0
    weight_gradient = columns * hidden * (2 if low else 4)
    if low and not job.fused:
        weight_gradient += columns * hidden * 4
    forward = 0 if mode == "keep" and not low else logits
    backward = gradient_rows + again + weight_gradient
    return HeadMemory(mode, kept if mode == "keep" else 12 * tokens, max(forward, backward))


def chunk_tokens(tokens: int, columns: int) -> int:
    """Rows whose fp32 logits exist at once on a GPU: a 16th of the tokens, in 256 MiB at most."""
    fitting = (256 << 20) // (4 * max(columns, 1))
    return max(256, min(-(-tokens // 16), fitting, 4096) // 128 * 128)


def head_products(mode: str, trained_fraction: float) -> float:
    """Products of H x V per token, forward and backward, in units of one forward.

    1 + 2k (keep) or 1 + 3k (recompute), where k is the trained fraction.
    """
    return 1 + (2 if mode == "keep" else 3) * trained_fraction
