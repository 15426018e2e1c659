"""The kernels against the plain torch passes.

Run by test_interpreted_kernels.py, in a process whose Triton interprets.
"""

import pytest
import torch

from megatron_slm.ops import linear_cross_entropy_triton as fused
from megatron_slm.ops import row_passes


def logits(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(rows, columns + 3, generator=generator) * 5.0
    wide[0, 0] = 80.0
    wide[1, columns - 1] = -90.0
    return wide[:, :columns]  # rows further apart than they are wide


@pytest.mark.parametrize("columns", [1, 70, 4096, 5000])
@pytest.mark.parametrize("kept_dtype", [None, torch.float32, torch.bfloat16])
def test_statistics(columns, kept_dtype):
    x = logits(3, columns)
    kept = None if kept_dtype is None else torch.full((3, columns), 7.0, dtype=kept_dtype)
    maximum, total = fused.softmax_statistics(x.clone(), kept)
    expected_kept = None if kept is None else torch.empty_like(kept)
    expected_maximum, expected_total = row_passes.softmax_statistics(x.clone(), expected_kept)
    assert torch.equal(maximum, expected_maximum)
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=0)
    if kept is not None:
        torch.testing.assert_close(
            kept, expected_kept, rtol=1e-2 if kept_dtype == torch.bfloat16 else 1e-5, atol=1e-7
        )


def test_statistics_kept_in_the_logits_own_memory():
    x = logits(4, 5000)
    maximum, _ = fused.softmax_statistics(x, x)
    torch.testing.assert_close(x, (logits(4, 5000) - maximum[:, None]).exp(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_gradient(out_dtype):
    x = logits(4, 5000)
    lse = x.logsumexp(1)
    scale = torch.tensor([1.0, -0.5, 0.0, 3.0])
    out = torch.empty(4, 5000, dtype=out_dtype)
    expected = torch.empty(4, 5000, dtype=out_dtype)
    fused.gradient_from_logits(x, lse, scale, out)
    row_passes.gradient_from_logits(x.clone(), lse, scale, expected)
    torch.testing.assert_close(
        out, expected, rtol=1e-2 if out_dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )
