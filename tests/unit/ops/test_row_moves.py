"""Rows of a gradient: found, gathered, put back; and the linears of a layer that share them."""

import pytest
import torch

from megatron_slm.ops.row_moves import Rows, has_gradient
from megatron_slm.ops.row_skipping import LayerRows
from tests.unit.ops.layer_pass_problems import random


@pytest.mark.parametrize("zero", [[], [0, 3], [0, 1, 2, 3]])
def test_gathered_and_put_back(zero):
    grad = random(4, 2, 5)
    grad[zero] = 0
    rows = Rows.with_gradient(grad)
    assert (rows.index_K is None) == (not zero)
    taken = rows.of(grad)
    assert len(taken) == 4 - len(zero)
    assert torch.equal(rows.spread(taken), grad.flatten(1))
    assert torch.equal(rows.spread(taken, torch.ones(4, 10)), grad.flatten(1) + 1)


def test_a_layer_looks_for_its_rows_once(monkeypatch):
    """In the gradient of its last linear; a backward that begins elsewhere looks for itself."""
    searched = []

    def counted(grad):
        searched.append(len(grad))
        return has_gradient(grad)

    monkeypatch.setattr("megatron_slm.ops.row_moves.has_gradient", counted)
    layer_rows = LayerRows()
    for zero in ([1], [0, 2]):  # two micro-batches
        searched.clear()
        grad = random(4, 1, 5)
        grad[zero] = 0
        found = layer_rows.of(grad, "last")
        assert layer_rows.of(grad, "inner") is found
        assert layer_rows.of(grad, "first") is found
        assert len(searched) == 1
        assert len(found.of(grad)) == 4 - len(zero)
    assert layer_rows.rows is None
    layer_rows.of(grad, "inner")
    assert len(searched) == 2
    layer_rows.of(grad, "last")
    assert layer_rows.of(random(6, 1, 5), "inner").count == 6
