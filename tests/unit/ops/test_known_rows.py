"""The head that was told which rows to compute, against the head that looks for them."""

import pytest
import torch

from megatron_slm.ops import linear_cross_entropy, selected_linear_cross_entropy
from megatron_slm.ops.known_rows import KnownRows
from megatron_slm.ops.vocab_parallel import KeptRowLayout, VocabularyShard
from tests.host_reads import host_reads

N, H, V = 70, 32, 96
IGNORED = 3


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(N, H, generator=generator).requires_grad_()
    weight_VH = (torch.randn(V, H, generator=generator) * 0.4).requires_grad_()
    target_N = torch.randint(0, V, (N,), generator=generator)
    target_N[IGNORED] = -100
    mask_N = torch.rand(N, generator=generator) < 0.6
    mask_N[IGNORED] = False
    return hidden_NH, weight_VH, target_N, mask_N


def told(mask: torch.Tensor, count: int | None = None) -> KnownRows:
    rows = KnownRows()
    rows.tell(mask, int(mask.sum()) if count is None else count)
    return rows


@pytest.mark.parametrize("mode", ("keep", "recompute"))
def test_told_rows_give_the_same_bits_and_nothing_is_read(mode):
    hidden_NH, weight_VH, target_N, mask_N = problem()
    found = []
    reads = []
    for rows in (KnownRows(), told(mask_N)):
        loss_N = linear_cross_entropy(hidden_NH, weight_VH, target_N, mode=mode, known_rows=rows)
        loss_sum = torch.where(mask_N, loss_N, 0.0).sum()
        with host_reads() as places:
            found.append(torch.autograd.grad(loss_sum, (hidden_NH, weight_VH)))
        reads.append(dict(places))
    for value, other in zip(*found, strict=True):
        assert torch.equal(value, other)
    assert reads == [{"ops/known_rows.py index": 1}, {}]


def test_told_rows_without_a_gradient_are_computed_and_change_nothing():
    hidden_NH, weight_VH, target_N, mask_N = problem()
    more_N = mask_N.clone()
    more_N[: N // 2] = True  # the ignored target among them
    found = []
    for rows in (KnownRows(), told(more_N)):
        loss_N = linear_cross_entropy(hidden_NH, weight_VH, target_N, known_rows=rows)
        found.append(torch.autograd.grad(loss_N[mask_N].sum(), (hidden_NH, weight_VH)))
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_selected_rows_that_were_told_give_the_same_bits_and_nothing_is_read():
    hidden_NH, weight_VH, target_N, mask_N = problem()
    weight_N = mask_N * 0.5
    found = []
    reads = []
    for rows in (KnownRows(), told(mask_N)):
        with host_reads() as places:
            loss_sum, loss_N = selected_linear_cross_entropy(
                hidden_NH, weight_VH, target_N, weight_N, known_rows=rows
            )
        places.pop("ops/head_call.py _check_ids")  # on a CPU only
        reads.append(dict(places))
        gradients = torch.autograd.grad(loss_sum, (hidden_NH, weight_VH))
        found.append((loss_sum, loss_N.nan_to_num(), *gradients))
    for value, other in zip(*found, strict=True):
        assert torch.equal(value, other)
    assert reads == [{"ops/known_rows.py index": 1}, {}]


def test_told_rows_of_weight_zero_get_their_loss_and_no_share_of_the_sum():
    hidden_NH, weight_VH, target_N, mask_N = problem()
    weight_N = mask_N.float()
    expected, _ = selected_linear_cross_entropy(hidden_NH, weight_VH, target_N, weight_N)
    everyone = told(torch.ones(N, dtype=torch.bool))
    loss_sum, loss_N = selected_linear_cross_entropy(
        hidden_NH, weight_VH, target_N, weight_N, known_rows=everyone
    )
    torch.testing.assert_close(loss_sum, expected)
    assert loss_N.isnan().nonzero().tolist() == [[IGNORED]]
    for value, other in zip(
        torch.autograd.grad(loss_sum, (hidden_NH, weight_VH)),
        torch.autograd.grad(expected, (hidden_NH, weight_VH)),
        strict=True,
    ):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", (2, 4))
def test_a_count_that_is_not_the_masks_is_refused(count):
    value_N = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match=f"was told of {count} rows"):
        told(value_N != 0, count).index(value_N)


def test_a_gradient_outside_the_told_rows_is_refused():
    value_N = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="leaves out a row that has a gradient"):
        told(torch.tensor([True, True, True, False])).index(value_N)


@pytest.mark.parametrize("rows", ([], [0, 1, 5], [2, 3, 4, 9, 10, 11], [8]))
def test_the_layout_of_sharded_rows_reads_the_host_once(rows):
    """12 rows over 4 ranks: each rank's rows, and their places among the padded ones of all."""
    index_K = torch.tensor(rows, dtype=torch.int64)
    padded = {}
    for rank in range(4):
        shard = VocabularyShard(None, 4, rank, 0, V, V)
        with host_reads() as places:
            layout = KeptRowLayout.of(index_K, 3, shard)
        assert dict(places) == {"ops/vocab_parallel.py of": 1}
        assert layout.rank_index.tolist() == [row - 3 * rank for row in rows if row // 3 == rank]
        for number, row in enumerate(layout.rank_index.tolist()):
            padded[rank * layout.longest + number] = 3 * rank + row
    assert [padded[slot] for slot in layout.slot_K.tolist()] == rows
    of_ranks = [row // 3 for row in rows]
    assert layout.longest == max(1, *(of_ranks.count(rank) for rank in range(4)))
