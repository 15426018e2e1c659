"""The part of the selection benchmark that goes to 512 ranks: computed from measured parts."""

import math
from dataclasses import astuple

import torch

from benchmarks.measure import median_cpu_seconds
from benchmarks.selection_ranks import KEEP
from megatron_slm.selection.populations import GATHER_MAX_TOKENS_ACCELERATOR
from megatron_slm.selection.radix import kth_largest_score
from megatron_slm.selection.threshold import find_threshold

# The stated model of a cluster: one NVLink or InfiniBand hop, 400 Gb/s per GPU, 400 TFLOP/s
# sustained of a 1.1 B-parameter model's 6 FLOP per parameter and token, 4.3 TB/s memory. Replace
# them with your own.
HOP_SECONDS = 10e-6
LINK_BYTES_PER_SECOND = 50e9
MODEL_FLOPS_PER_TOKEN = 6 * 1.1e9
SUSTAINED_FLOPS = 400e12
MEMORY_BYTES_PER_SECOND = 4.3e12
KERNEL_SECONDS = 5e-6
FRACTION_GATE = 0.01
"""Of the step's time, at most."""
SAMPLE_TOKENS = 1 << 20
HEADER = (
    "| ranks | tokens per step | step, ms | all-gather + topk, accelerator | auto, accelerator | "
    "| all-gather + topk, CPU ranks | radix, CPU ranks |\n|---|---|---|---|---|---|---|---|"
)


def scaling(rounds: int) -> list[dict]:
    """The stated model: time = work + collectives.

    An all-reduce of b bytes over R ranks takes 2 log2(R) hops + 2 b (R-1)/R / bandwidth, an
    all-gather log2(R) hops + b (R-1)/R / bandwidth. Work on an accelerator is passes over memory at
    its bandwidth plus 5 us a kernel: topk and its mask 10 passes and 25 kernels, a sort and its
    counts 12 passes and 25 kernels, radix 12 passes over the rank's own tokens and 60 kernels. auto
    knows the capacity, as training does.

    Checked on the way: the counts of the radix select give the answer of one quickselect.
    """
    score = torch.randn(16_777_216, generator=torch.Generator().manual_seed(0))
    assert kth_largest_score(score, KEEP, None) == astuple(find_threshold(score, KEEP, None))
    sample = score[:SAMPLE_TOKENS]
    cpu_seconds = median_cpu_seconds(
        {
            "radix": lambda: kth_largest_score(sample, KEEP, None),
            "topk": lambda: sample.topk(600_000, sorted=False),
        },
        rounds,
    )
    radix_seconds = cpu_seconds["radix"] / SAMPLE_TOKENS
    topk_seconds = cpu_seconds["topk"] / SAMPLE_TOKENS
    print(
        "\n### Computed: one selection over all tokens of a step, milliseconds "
        "(fraction of the step of a 1.1 B model)\n\n"
        f"Measured on one CPU core: radix {radix_seconds * 1e9:.1f} ns per token, "
        f"topk {topk_seconds * 1e9:.1f} ns per token.\n"
    )
    print(HEADER)
    lines = []
    for ranks in (8, 32, 128, 512):
        for tokens in (1_048_576, 4_194_304, 16_777_216):
            lines.append(_row(ranks, tokens, radix_seconds, topk_seconds))
    return lines


def _row(ranks: int, tokens: int, radix_seconds: float, topk_seconds: float) -> dict:
    """Print one row, and return its line; `radix_seconds`, `topk_seconds`: of a CPU per token."""
    step = MODEL_FLOPS_PER_TOKEN * tokens / ranks / SUSTAINED_FLOPS
    hops = math.log2(ranks) * HOP_SECONDS
    gather = hops + 4 * tokens * (ranks - 1) / ranks / LINK_BYTES_PER_SECOND
    reduce = 3 * (2 * hops + 2 * 8 * 2048 * (ranks - 1) / ranks / LINK_BYTES_PER_SECOND)
    peer = gather + _device_seconds(10, tokens, 25)
    if tokens <= GATHER_MAX_TOKENS_ACCELERATOR:
        way, ours = "gather", gather + _device_seconds(12, tokens, 25)
    else:
        way, ours = "radix", reduce + _device_seconds(12, tokens / ranks, 60)
    cpu_peer = gather + topk_seconds * tokens
    cpu_radix = reduce + radix_seconds * tokens / ranks
    print(
        f"| {ranks} | {tokens} | {step * 1e3:.0f} | {peer * 1e3:.2f} ({peer / step:.2%}) | "
        f"{ours * 1e3:.2f} ({ours / step:.2%}) | {way} | {cpu_peer * 1e3:.1f} | "
        f"{cpu_radix * 1e3:.1f} |"
    )
    return {
        "case": f"scaling, {ranks} ranks, {tokens} tokens",
        "seconds": ours,
        "ratio": ours / step,
        "gate": FRACTION_GATE,
    }


def _device_seconds(passes: int, tokens: float, kernels: int) -> float:
    return passes * 4 * tokens / MEMORY_BYTES_PER_SECOND + kernels * KERNEL_SECONDS
