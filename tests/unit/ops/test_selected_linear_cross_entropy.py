"""The head on rows known before it, against the head that sees every row."""

import pytest
import torch

from megatron_slm.ops import linear_cross_entropy, selected_linear_cross_entropy

N, H, V, TRUE_V = 70, 32, 96, 90


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * 0.4).to(dtype).requires_grad_()
    target = torch.randint(0, TRUE_V, (N,), generator=generator)
    target[3] = -100
    weight_N = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) < 0.6)
    return hidden, weight, target, weight_N


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("kind", ["weights", "mask", "nothing"])
def test_equals_the_head_over_all_rows(dtype, limit, kind):
    hidden, weight, target, weight_N = problem(dtype)
    if kind == "mask":
        weight_N = weight_N != 0
    elif kind == "nothing":
        weight_N = torch.zeros(N, dtype=torch.bool)
    options = dict(vocabulary_size=TRUE_V, z_loss=0.1, chunk_tokens=16)
    everything = linear_cross_entropy(hidden, weight, target, **options)
    expected = torch.autograd.grad((everything * weight_N).sum() * 0.25, (hidden, weight))
    loss_sum, loss = selected_linear_cross_entropy(hidden, weight, target, weight_N, **options)
    got = torch.autograd.grad(loss_sum * 0.25, (hidden, weight))
    computed = (weight_N != 0) & (target != -100)
    assert torch.equal(loss.isnan(), ~computed)
    torch.testing.assert_close(loss[computed], everything[computed].detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss_sum, (everything * weight_N).sum(), rtol=1e-6, atol=1e-6)
    for value, other in zip(got, expected, strict=True):
        assert (value - other).norm() <= limit * other.norm()


def test_rows_not_selected_are_never_read():
    hidden, weight, target, weight_N = problem()
    with torch.no_grad():
        hidden[weight_N == 0] = torch.nan
    loss_sum, _ = selected_linear_cross_entropy(hidden, weight, target, weight_N)
    loss_sum.backward()
    assert loss_sum.isfinite()
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_without_grad_no_gradient_is_computed_and_main_grad_is_filled_with_it():
    hidden, weight, target, weight_N = problem()
    with torch.no_grad():
        scored, _ = selected_linear_cross_entropy(hidden, weight, target, weight_N)
    parameter = torch.nn.Parameter(weight.detach().clone())
    parameter.main_grad = torch.ones(V, H)
    parameter.grad_added_to_main_grad = False
    loss_sum, _ = selected_linear_cross_entropy(
        hidden, parameter, target, weight_N, accumulate_into_main_grad=True
    )
    assert torch.equal(scored, loss_sum)
    assert torch.equal(parameter.main_grad, torch.ones(V, H)), "nothing is added before backward"
    (2.0 * loss_sum).backward(retain_graph=True)
    (expected,) = torch.autograd.grad(
        2.0 * selected_linear_cross_entropy(hidden, weight, target, weight_N)[0], weight
    )
    torch.testing.assert_close(parameter.main_grad - 1.0, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="one backward per forward"):
        loss_sum.backward()


def test_selected_must_have_the_shape_of_target():
    hidden, weight, target, weight_N = problem()
    with pytest.raises(ValueError, match="same shape"):
        selected_linear_cross_entropy(hidden, weight, target, weight_N[:-1])
