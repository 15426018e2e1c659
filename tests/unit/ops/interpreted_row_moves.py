"""The kernels that find, gather and put back rows, against plain torch.

Run by test_interpreted_kernels.py, in a process whose Triton interprets.
"""

import pytest
import torch

from megatron_slm.ops import row_moves_triton
from megatron_slm.ops.row_moves import Rows, has_gradient
from tests.unit.ops.layer_pass_problems import random

DTYPES = [torch.float32, torch.bfloat16]


def gradient(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows 0, 3, 6 ... are zero, row 1 is zero but for its last value; a negative zero counts."""
    grad = random(rows, columns)
    grad[::3] = -0.0
    if rows > 1:
        grad[1, :-1] = 0.0
    return grad.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 48), (5, 2500)])
def test_rows_with_a_gradient(rows, columns, dtype):
    grad = gradient(rows, columns, dtype)
    assert torch.equal(row_moves_triton.has_gradient(grad), has_gradient(grad))


def test_nan_is_a_gradient():
    grad = torch.zeros(3, 40)
    grad[1, 20] = torch.nan
    assert row_moves_triton.has_gradient(grad).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_every_block_is_found_and_gathered(dtype):
    """The queries of every key/value group, inside the joint product's gradient."""
    joint = random(9, 3 * 100).to(dtype).unflatten(1, (3, 100))
    joint[::2, :, :70] = 0
    queries = joint[:, :, :70]
    assert torch.equal(row_moves_triton.has_gradient(queries), has_gradient(queries))
    index = torch.tensor([1, 4, 7])
    assert torch.equal(row_moves_triton.take(queries, index), queries[index].flatten(1))


@pytest.mark.parametrize("columns", [1, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered(columns, dtype):
    rows = random(6, columns).to(dtype)
    index = torch.tensor([0, 2, 5])
    assert torch.equal(row_moves_triton.take(rows, index), rows[index])


@pytest.mark.parametrize("index", [[0, 2, 5], [3], []])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("columns", [8, 1500])
def test_put_back(index, added, columns):
    rows = Rows(6, torch.tensor(index, dtype=torch.int64))
    values = random(len(index), columns)
    onto = random(6, columns, seed=1) if added else None
    got = row_moves_triton.spread(values, rows.places(), onto.clone() if added else None)
    expected = rows.spread(values, onto)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
