"""The planned head is the head that ops/head_plan.py would choose, and does the products that ops
does.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_slm.config.load import from_mapping
from megatron_slm.ops import linear_cross_entropy, plan_head
from megatron_slm.ops.head_plan import KEPT_BUDGET_BYTES
from megatron_slm.planning import head as planned
from megatron_slm.planning.hardware import find_gpu
from megatron_slm.planning.job import Job


def job(precision: str, tokens: int, columns: int) -> Job:
    config, problems = from_mapping(
        {
            "device": {"precision": precision},
            "data": {"sequence_length": tokens, "micro_batch_size": 1, "global_batch_size": 1},
            "model": {"vocabulary_size": columns},
        }
    )
    assert not problems
    return Job(config, columns, find_gpu("H100"), gpus_per_node=1)


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("tokens", [64, 2048, 8192, 65536])
@pytest.mark.parametrize("columns", [512, 32000, 64128, 128256])
def test_the_choices_are_those_of_the_head(precision, dtype, tokens, columns):
    real = plan_head(tokens, columns, dtype, torch.device("cuda"))
    memory = planned.head_memory(job(precision, tokens, columns))
    assert planned.KEPT_BUDGET_BYTES == KEPT_BUDGET_BYTES
    assert memory.mode == real.mode
    assert memory.kept_bytes == (real.kept_bytes if real.mode == "keep" else 12 * tokens)
    assert min(planned.chunk_tokens(tokens, columns), tokens) == real.chunk_tokens


def test_scratch_of_a_large_head_by_hand():
    """65536 tokens over 128256 columns in bf16: 16 GiB would be kept, so logits are computed again,
    512 rows at a time.
    """
    memory = planned.head_memory(job("bf16", 65536, 128256))
    logits, gradient_rows, weight_gradient = (
        512 * 128256 * 4,
        6 * 512 * 128256 * 2,
        128256 * 256 * 2,
    )
    assert (memory.mode, memory.scratch_bytes) == (
        "recompute",
        logits + gradient_rows + weight_gradient,
    )


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("trained", [0.25, 1.0])
def test_products_are_the_counted_ones(mode, trained):
    tokens, hidden_size, columns = 64, 16, 96
    hidden, weight = (
        torch.randn(tokens, hidden_size, requires_grad=True),
        torch.randn(columns, hidden_size, requires_grad=True),
    )
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(hidden, weight, torch.arange(tokens), mode=mode)
        loss[: int(trained * tokens)].sum().backward()
    assert counter.get_total_flops() == 2 * tokens * hidden_size * columns * planned.head_products(
        mode, trained
    )
