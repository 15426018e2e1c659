"""Linears that leave zero gradient rows out, which is exact; and rows dropped below a layer.

Of the latter: what changes, and what does not.

Legend: N tokens, H features.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_slm.ops.row_dropping import drop_unselected_rows
from megatron_slm.ops.row_skipping import linear_skipping_zero_rows, skip_zero_gradient_rows

N, H = 24, 16


class Linear(nn.Linear):
    """The shape of megatron-core's parallel linears: the product sits in _forward_impl."""

    def _forward_impl(self, input, weight, bias=None):
        return F.linear(input, weight, bias)

    def forward(self, input):
        return self._forward_impl(input=input, weight=self.weight, bias=self.bias)


class Layer(nn.Module):
    """Causal attention and MLP with residuals."""

    def __init__(self):
        super().__init__()
        self.qkv = Linear(H, 3 * H)
        self.projection = Linear(H, H)
        self.up = Linear(H, 4 * H)
        self.down = Linear(4 * H, H)

    def forward(self, hidden_states):
        query, key, value = self.qkv(F.layer_norm(hidden_states, (H,))).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
        hidden_states = hidden_states + self.projection(mixed[0])
        return hidden_states + self.down(F.gelu(self.up(F.layer_norm(hidden_states, (H,))))), None


def run(layers, selected):
    """Gradients of every parameter and of the input of each layer."""
    torch.manual_seed(1)
    states = [torch.randn(N, H, requires_grad=True)]
    for layer in layers:
        states.append(layer(hidden_states=states[-1])[0])
        states[-1].retain_grad()
    layers.zero_grad()
    (states[-1].square() * selected[:, None]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layers.named_parameters()}
    return gradients, [state.grad.clone() for state in states]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.ModuleList([Layer(), Layer(), Layer()])


@pytest.fixture
def selected():
    return torch.rand(N, generator=torch.Generator().manual_seed(2)) < 0.6


@pytest.mark.parametrize("rows", ["some", "all", "none"])
def test_linear_is_exact_and_never_reads_zero_rows(rows):
    torch.manual_seed(0)
    operands = [
        torch.randn(4, 6, H).requires_grad_(),
        torch.randn(8, H).requires_grad_(),
        torch.randn(8).requires_grad_(),
    ]
    upstream = torch.randn(4, 6, 8)
    upstream = upstream * {"some": torch.rand(4, 6, 1) < 0.5, "all": 1.0, "none": 0.0}[rows]
    expected = torch.autograd.grad(F.linear(*operands), operands, upstream)
    torch.testing.assert_close(linear_skipping_zero_rows(*operands), F.linear(*operands))
    with torch.no_grad():  # 0 * NaN would spoil the weight's gradient
        operands[0].masked_fill_((upstream == 0).all(-1, keepdim=True), torch.nan)
    got = torch.autograd.grad(linear_skipping_zero_rows(*operands), operands, upstream)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_queries_leave_out_their_rows_and_keys_and_values_none():
    """Two key/value groups of 2 query columns, a key column and a value column each.

    8 of 24 rows have a query gradient, 20 a key or value gradient.
    """
    torch.manual_seed(0)
    operands = [
        torch.randn(N, H).requires_grad_(),
        torch.randn(8, H).requires_grad_(),
        torch.randn(8).requires_grad_(),
    ]
    upstream = torch.randn(N, 2, 4)
    upstream[8:, :, :2] = 0
    upstream[20:, :, 2:] = 0
    upstream = upstream.flatten(1)
    expected = torch.autograd.grad(F.linear(*operands), operands, upstream)
    output = linear_skipping_zero_rows(*operands, blocks=2, head_columns=2)
    with FlopCounterMode(display=False) as counter:
        got = torch.autograd.grad(output, operands, upstream)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    assert counter.get_total_flops() == 2 * 2 * H * (8 * 4 + N * 4), (
        "two products of 4 columns each, over 8 rows and over all"
    )


@pytest.mark.parametrize("columns", [{}, dict(blocks=2, head_columns=3)])
def test_main_grad_takes_the_weight_gradient(columns):
    torch.manual_seed(0)
    input = torch.randn(N, H)
    weight = nn.Parameter(torch.randn(8, H))
    weight.main_grad = torch.ones(8, H)
    weight.grad_added_to_main_grad = False
    upstream = torch.randn(N, 8)
    upstream[::2] = 0
    linear_skipping_zero_rows(input, weight, gradient_accumulation_fusion=True, **columns).backward(
        upstream
    )
    torch.testing.assert_close(weight.main_grad, 1 + upstream.t() @ input)
    assert weight.grad_added_to_main_grad


def test_last_layer_exactly(layers, selected):
    exact_parameters, exact_states = run(layers, selected)
    assert skip_zero_gradient_rows(layers[-1]) == 4
    parameters, states = run(layers, selected)
    for name in exact_parameters:
        torch.testing.assert_close(parameters[name], exact_parameters[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[0], exact_states[0], rtol=1e-5, atol=1e-5)


def test_dropped_rows_stay_zero_and_point_the_same_way(layers, selected):
    exact_parameters, exact_states = run(layers, selected)
    handles = drop_unselected_rows(layers)
    skip_zero_gradient_rows(layers)
    parameters, states = run(layers, selected)
    assert all(not state[~selected].any() for state in states), (
        "unselected tokens get no gradient at any layer's entry"
    )
    assert exact_states[0][~selected].any(), "and they do in the exact backward"
    for name, exact in exact_parameters.items():
        cosine = F.cosine_similarity(parameters[name].flatten(), exact.flatten(), dim=0)
        if name.startswith("2."):  # the last layer loses nothing
            torch.testing.assert_close(parameters[name], exact, rtol=1e-5, atol=1e-5)
        else:
            assert 0.7 < cosine < 0.9999, f"{name}: {cosine}"
    for handle in handles:
        handle.remove()
    again, _ = run(layers, selected)
    torch.testing.assert_close(
        again["0.up.weight"], exact_parameters["0.up.weight"], rtol=1e-5, atol=1e-5
    )


def test_every_token_selected_changes_nothing(layers):
    everyone = torch.ones(N, dtype=torch.bool)
    exact, _ = run(layers, everyone)
    drop_unselected_rows(layers)
    skip_zero_gradient_rows(layers)
    parameters, _ = run(layers, everyone)
    for name in exact:
        torch.testing.assert_close(parameters[name], exact[name], rtol=1e-5, atol=1e-5)


def test_a_module_without_such_linears_is_an_error():
    with pytest.raises(ValueError, match="no trainable megatron-core linear"):
        skip_zero_gradient_rows(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("columns", [{}, dict(blocks=2, head_columns=2)])
def test_no_rows_at_all(columns):
    """An expert that no token chose."""
    rows = torch.randn(0, H, requires_grad=True)
    weight = torch.randn(12, H, requires_grad=True)
    linear_skipping_zero_rows(rows, weight, **columns).sum().backward()
    assert rows.grad.shape == (0, H)
    assert torch.equal(weight.grad, torch.zeros(12, H))
