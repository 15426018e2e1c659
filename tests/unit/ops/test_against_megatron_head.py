"""The selective head against megatron-core's own materialised head.

In bf16 it is no further from fp64 than that one, in the loss and in both gradients.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_slm.ops import linear_cross_entropy, selected_linear_cross_entropy

N, H, V = 256, 64, 512


@pytest.fixture(scope="module")
def megatron_loss(tmp_path_factory):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if dist.is_initialized():
        pytest.skip("another test left a process group open")
    store = dist.FileStore(os.fspath(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield vocab_parallel_cross_entropy
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * 0.4).to(dtype).requires_grad_()
    selected = (torch.rand(N, generator=generator) < 0.6).float()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator), selected


def errors(loss, gradients, selected) -> dict[str, float]:
    """Relative distance from the fp64 head of the same bf16 operands."""
    hidden, weight, target, _ = problem(torch.bfloat16)
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    loss_ref = F.cross_entropy(hidden @ weight.t(), target, reduction="none")
    references = (
        loss_ref.detach(),
        *torch.autograd.grad((loss_ref * selected).sum(), (hidden, weight)),
    )
    return {
        name: ((value.double() - reference).norm() / reference.norm()).item()
        for name, value, reference in zip(
            ("loss", "d hidden", "d weight"), (loss.detach(), *gradients), references, strict=True
        )
    }


@pytest.mark.parametrize("ours", ["keep", "recompute", "known"])
def test_bf16_is_no_further_from_fp64_than_megatrons_head(ours, megatron_loss):
    hidden, weight, target, selected = problem(torch.bfloat16)
    theirs = megatron_loss((hidden @ weight.t())[:, None], target[:, None])[:, 0]
    peer = errors(
        theirs, torch.autograd.grad((theirs * selected).sum(), (hidden, weight)), selected
    )
    if ours == "known":
        _, loss = selected_linear_cross_entropy(hidden, weight, target, torch.ones(N))
        total, _ = selected_linear_cross_entropy(hidden, weight, target, selected)
    else:
        loss = linear_cross_entropy(hidden, weight, target, mode=ours)
        total = (loss * selected).sum()
    mine = errors(loss, torch.autograd.grad(total, (hidden, weight)), selected)
    assert all(mine[name] <= peer[name] for name in mine), (mine, peer)
    assert mine["loss"] < 1e-6 < 1e-4 < peer["loss"], "fp32 sums against logits rounded to bf16"


def test_all_rows_equal_megatrons_head_in_fp32(megatron_loss):
    hidden, weight, target, _ = problem(torch.float32)
    theirs = megatron_loss((hidden @ weight.t())[:, None], target[:, None])[:, 0]
    expected = torch.autograd.grad(theirs.sum(), (hidden, weight))
    mine = linear_cross_entropy(hidden, weight, target)
    got = torch.autograd.grad(mine.sum(), (hidden, weight))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
