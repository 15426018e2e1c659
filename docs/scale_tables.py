"""Write the tables of docs/scale.md with the planner, so that the page cannot be out of date.

    python docs/scale_tables.py

Everything above the line MARK in the page is written by hand and stays.
"""

import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_slm.config.load import load_yaml  # noqa: E402
from megatron_slm.planning.efficiency import TRANSFORMER_ENGINE  # noqa: E402
from megatron_slm.planning.hardware import find_gpu  # noqa: E402
from megatron_slm.planning.job import Job  # noqa: E402
from megatron_slm.planning.result import Plan, make_plan  # noqa: E402
from megatron_slm.planning.tables import Table, tables  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
EFFICIENCY = TRANSFORMER_ENGINE.training
MARK = "<!-- From here on written by docs/scale_tables.py. -->"
RUNS = {
    "TinyLlama-1.1B on 32 GPUs": ("tinyllama_1.1b_math_slm", 4),
    "Llama-3-8B on 128 GPUs": ("llama3_8b_slm", 16),
    "Llama-3-70B on 2048 GPUs": ("llama3_70b_slm", 256),
}
# (what, GPU, tokens per second and GPU that were published, recipe whose model it is, nodes)
ANCHORS = (
    (
        "[TinyLlama](https://github.com/jzhang38/TinyLlama), 16 A100 40 GB, plain",
        "A100 40GB",
        24_000,
        "tinyllama_1.1b_math_clm",
        2,
    ),
    (
        "[torchtitan](https://github.com/pytorch/torchtitan/blob/main/benchmarks/"
        "llama3_h100_202412_torchtitan.md), Llama-3.1-8B, 8 H100 of 500 W, bf16, compiled",
        "H100",
        6_667,
        "llama3_8b_slm",
        1,
    ),
    (
        "[Rho-1](https://arxiv.org/abs/2404.07965), 15 B tokens in about 3.5 hours on 32 H100, "
        "selective",
        "H100",
        15e9 / 3.5 / 3600 / 32,
        "tinyllama_1.1b_math_slm",
        4,
    ),
)
# The arithmetic of the worked example: name, expression with the recipe's numbers. Checked against
# the planner below.
TERMS_8B = {
    "Parameters of one tensor rank": [
        (
            "queries, keys and values, output, feed-forward of a layer",
            "((32 + 2 * 8) * 128 * 4096 + 32 * 128 * 4096 + 3 * 14336 * 4096) / 2",
        ),
        (
            "32 layers with two norms each",
            "32 * (((32 + 2 * 8) * 128 * 4096 + 32 * 128 * 4096 + 3 * 14336 * 4096) / 2 + 2 * "
            "4096)",
        ),
        ("embedding and head, last norm", "2 * 128256 / 2 * 4096 + 4096"),
        (
            "**parameters**",
            "32 * (((32 + 2 * 8) * 128 * 4096 + 32 * 128 * 4096 + 3 * 14336 * 4096) / 2 + 2 * "
            "4096) + 2 * 128256 / 2 * 4096 + 4096",
        ),
    ],
    "Activations of one micro-batch, bytes per token and layer (8192 tokens, 2 bytes a value, "
    "tensor 2 with sequence parallelism)": [
        ("norms: input and output, split by sequence parallelism", "2 * 4096 * (2 + 2) / 2"),
        (
            "attention: projection, rotated queries and keys, output, log-sum-exp",
            "(((32 + 16) + (32 + 8) + 32) * 128 * 2 + 4 * 32) / 2",
        ),
        ("feed-forward: gate, up, their product", "3 * 14336 * 2 / 2"),
    ],
    "FLOPs per token": [
        (
            "layers, forward",
            "32 * (2 * 4096 * (2 * 4096 + 2 * 8 * 128) + 2 * 4096 * (8192 + 1) + 6 * 4096 * 14336)",
        ),
        ("head, forward", "2 * 4096 * 128256"),
        (
            "**model** (3 times both)",
            "3 * (32 * (2 * 4096 * (2 * 4096 + 2 * 8 * 128) + 2 * 4096 * (8192 + 1) + 6 * 4096 * "
            "14336) + 2 * 4096 * 128256)",
        ),
        (
            "**executed** (the head: 1 + 2 * 0.6)",
            "3 * 32 * (2 * 4096 * (2 * 4096 + 2 * 8 * 128) + 2 * 4096 * (8192 + 1) + 6 * 4096 * "
            "14336) + (1 + 2 * 0.6) * 2 * 4096 * 128256",
        ),
    ],
}


def plan_of(recipe: str, nodes: int, gpu: str = "H100", proposals: int = 0) -> Plan:
    config = load_yaml(ROOT / "launch" / "recipes" / f"{recipe}.yaml")
    return make_plan(Job(config, config.model.vocabulary_size, find_gpu(gpu), nodes), proposals)


def markdown(table: Table) -> list[str]:
    headings = table.headings if any(table.headings) else ("",) * len(table.headings)
    aligned = "|".join(
        "--:" if table.is_numeric(place) and any(table.headings) else "---"
        for place in range(len(headings))
    )
    return [
        f"**{table.title}**",
        "",
        f"| {' | '.join(headings)} |",
        f"|{aligned}|",
        *map(table_row, table.rows),
        "",
    ]


def table_row(cells: tuple[str, ...]) -> str:
    shown = [cell.replace("  ", "&emsp;") for cell in cells]
    return f"| {' | '.join(shown)} |"


def value(expression: str) -> float:
    """The expressions above are sums and products of numbers."""
    assert re.fullmatch(r"[\d\s.+*/()-]+", expression)
    return eval(expression)


def by_hand(plan: Plan) -> list[str]:
    """The worked example; AssertionError where the arithmetic and the planner disagree."""
    return [
        "## Llama-3-8B by hand",
        "",
        "The same numbers from the formulas, with `llama3_8b_slm.yaml`'s sizes put in: hidden "
        "4096, 32 layers, 32 query and 8 key/value heads of 128, feed-forward 14336, vocabulary "
        "128256, sequences of 8192, tensor 2 with sequence parallelism, 64 data-parallel ranks, "
        "8 micro-batches of one sequence.",
        "",
        *terms_by_hand(),
        *memory_by_hand(plan),
        *time_by_hand(plan),
        "",
    ]


def terms_by_hand() -> list[str]:
    """The expressions of TERMS_8B and their values."""
    lines = []
    for title, terms in TERMS_8B.items():
        lines += [f"**{title}**", "", "| | | |", "|---|---|--:|"]
        lines += [
            f"| {name} | `{expression}` | {value(expression):,.0f} |" for name, expression in terms
        ]
        lines.append("")
    return lines


def memory_by_hand(plan: Plan) -> list[str]:
    """Memory of a rank, from the terms."""
    parameters = value(TERMS_8B["Parameters of one tensor rank"][-1][1])
    per_token = sum(value(expression) for _, expression in list(TERMS_8B.values())[1])
    activations = 32 * 8192 * per_token + 8192 * 4096 * (2 + 2) / 2
    head = 8192 * 64128 * 2 + 64128 * 4096 * 2
    memory = plan.memory[0]
    assert parameters == plan.stages[0].total
    assert activations == memory.activations
    assert head == memory.head
    assert memory.weights == 2 * parameters
    assert memory.gradients == 4 * parameters
    assert memory.optimizer == 12 * parameters / 64
    return [
        f"- Memory: weights 2 × {parameters:,.0f} = {gib(memory.weights)}; gradients 4 × that "
        f"number = {gib(memory.gradients)}; optimizer 12 × that number / 64 = "
        f"{gib(memory.optimizer)}.",
        f"- Activations: 32 layers × 8192 tokens × {per_token:,.0f} bytes, and the last norm's "
        f"8192 × 4096 × (2 + 2) / 2 = {gib(activations)}.",
        "- Head, keep mode: 8192 × 64128 kept values of 2 bytes, and in backward a placeholder of "
        f"the weight's gradient, 64128 × 4096 in bf16 = {gib(head)}.",
    ]


def time_by_hand(plan: Plan) -> list[str]:
    """Seconds of a step, from the terms."""
    model, executed = (value(expression) for _, expression in TERMS_8B["FLOPs per token"][-2:])
    time = plan.duration
    message = 8192 * 4096 * 2
    sent = 8 * 0.5 * (message * (32 * 10 + 2 + 1 + 2 * 0.6) + 8 * 8192 * 2)
    compute_seconds = 4194304 * executed / (128 * 989e12 * EFFICIENCY)
    tensor_seconds = sent / (450e9 * 0.8)
    assert math.isclose(model, plan.work.model, rel_tol=1e-12)
    assert math.isclose(executed, plan.work.executed, rel_tol=1e-12)
    assert math.isclose(compute_seconds, time.compute_seconds, rel_tol=1e-9)
    assert math.isclose(tensor_seconds, time.communication_seconds, rel_tol=1e-9)
    return [
        f"- Time: 4,194,304 tokens × {executed / 1e9:,.2f} GFLOP / (128 × 989 TFLOP/s × "
        f"{EFFICIENCY:.2f}) = {compute_seconds:.3f} s of computing.",
        f"- Tensor parallelism: a message is 8192 × 4096 × 2 bytes = {message / 2**20:.0f} MiB; "
        "ten halves of an all-reduce per layer, two for the embedding and 1 + 2 × 0.6 for the "
        f"head, (2 - 1)/2 of each, 8 micro-batches: {sent / 1e9:,.1f} GB over NVLink at 0.8 × 450 "
        f"GB/s = {tensor_seconds:.3f} s.",
        f"- Step: {time.step_seconds:.3f} s, which is 4,194,304 / {time.step_seconds:.3f} = "
        f"{time.tokens_per_second:,.0f} tokens/s.",
    ]


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"


def anchors() -> list[str]:
    """Public throughputs, and the efficiency at which the planner would print them."""
    lines = [
        f"## Is {EFFICIENCY:.0%} plausible?",
        "",
        "What others published, in this page's definition of MFU (a causal mask's half of "
        "attention is not counted as work):",
        "",
        f"| | tokens/s and GPU, published | MFU | the plan at {EFFICIENCY:.0%} |",
        "|---|--:|--:|--:|",
    ]
    for what, gpu, rate, recipe, nodes in ANCHORS:
        plan = plan_of(recipe, nodes, gpu)
        utilization = rate * plan.work.model / plan.job.gpu.bf16_flops_per_second
        lines.append(
            f"| {what} | {rate:,.0f} | {utilization:.0%} | "
            f"{plan.duration.tokens_per_second / plan.job.ranks:,.0f} |"
        )
    return [
        *lines,
        "| [Megatron-LM](https://github.com/NVIDIA/Megatron-LM/blob/main/README.md), 2 B and "
        "larger, H100 | - | 41 to 48 % (its own count) | - |",
        "",
        f"{EFFICIENCY:.0%} was measured on one H200 at TinyLlama's shape, with revision "
        "8855768 of this code. These "
        "are other people's measurements of other programs, on many GPUs: they bound the "
        "efficiency, they do not confirm the plan.",
        "",
    ]


def tables_text() -> str:
    lines = []
    for title, (recipe, nodes) in RUNS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "```bash",
            f"python -m megatron_slm.plan --config launch/recipes/{recipe}.yaml --gpu H100 "
            f"--nodes {nodes}",
            "```",
            "",
        ]
        for table in tables(plan_of(recipe, nodes, proposals=5)):
            lines += markdown(table)
    lines += by_hand(plan_of("llama3_8b_slm", 16)) + anchors()
    return "\n".join(lines)


def page() -> str:
    """What the page should be."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + tables_text()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
