"""The sum of the weight's gradient, and megatron-core's main_grad protocol.

Memory that was never written is NaN here (conftest.py).
"""

import pytest
import torch

from megatron_slm.ops.weight_gradient import (
    WeightGradient,
    deliver_weight_gradient,
    placeholder_gradient,
)

ROWS, COLUMNS, H = 10, 7, 4


def parameter(main_grad_dtype=torch.float32) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.zeros(ROWS, H))
    made.main_grad = torch.ones(ROWS, H, dtype=main_grad_dtype)
    return made


def chunk(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, COLUMNS, generator=generator), torch.randn(5, H, generator=generator)


@pytest.mark.parametrize("into_main_grad", [False, True])
def test_chunks_add_up_and_padding_gets_nothing(into_main_grad):
    target = parameter() if into_main_grad else None
    gradient = WeightGradient(torch.zeros(ROWS, H), COLUMNS, target)
    expected = torch.full((ROWS, H), 1.0 if into_main_grad else 0.0)
    for seed in range(3):
        gradient_CV, hidden_CH = chunk(seed)
        gradient.add(gradient_CV, hidden_CH)
        expected[:COLUMNS] += gradient_CV.t() @ hidden_CH
    torch.testing.assert_close(gradient.total(), expected)
    if target is not None:
        assert gradient.total() is target.main_grad


def test_a_finished_product_adds_like_a_chunk():
    gradient = WeightGradient(torch.zeros(ROWS, H), COLUMNS, None)
    gradient.add_product(torch.ones(COLUMNS, H))
    gradient.add_product(torch.ones(COLUMNS, H))
    assert torch.equal(gradient.total()[:COLUMNS], torch.full((COLUMNS, H), 2.0))
    assert not gradient.total()[COLUMNS:].any()


@pytest.mark.parametrize("target", [None, parameter(torch.bfloat16)])
def test_nothing_added_is_zero(target):
    """Also beside a main_grad that is not fp32: the sum then has a buffer of its own."""
    total = WeightGradient(torch.zeros(ROWS, H), COLUMNS, target).total()
    assert torch.equal(total, torch.zeros(ROWS, H))


def test_the_placeholder_of_a_tied_weight_is_zero():
    """The embedding adds its gradient to it, and megatron-core adds the sum to main_grad."""
    tied = parameter()
    tied.grad_added_to_main_grad = False
    tied.zero_out_wgrad = True
    assert torch.equal(placeholder_gradient(tied), torch.zeros(ROWS, H))
    assert tied.grad_added_to_main_grad


def test_without_the_flag_autograd_gets_nothing():
    plain = parameter()
    assert placeholder_gradient(plain) is None
    assert not hasattr(plain, "grad_added_to_main_grad")


def test_a_gradient_in_a_buffer_of_its_own_is_added_to_main_grad_once():
    target = parameter(torch.bfloat16)
    assert deliver_weight_gradient(torch.ones(ROWS, H), target, torch.bfloat16) is None
    assert torch.equal(target.main_grad, torch.full((ROWS, H), 2.0, dtype=torch.bfloat16))
    fp32 = parameter()
    deliver_weight_gradient(fp32.main_grad, fp32, torch.float32)
    assert torch.equal(fp32.main_grad, torch.ones(ROWS, H)), "main_grad itself is already there"
