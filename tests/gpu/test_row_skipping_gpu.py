"""The linear that leaves zero gradient rows out, on a GPU. Skipped without CUDA.

bf16 products, fp32 main_grad.
"""

import pytest
import torch
import torch.nn.functional as F

from megatron_slm.ops.row_skipping import linear_skipping_zero_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N, INPUTS, BLOCKS, COLUMNS, QUERIES = 512, 256, 4, 96, 64


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head_columns", [0, QUERIES])
def test_gradients_are_those_of_a_linear(fused, head_columns):
    generator = torch.Generator("cuda").manual_seed(0)
    input = torch.randn(N, INPUTS, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = torch.nn.Parameter(
        torch.randn(BLOCKS * COLUMNS, INPUTS, generator=generator, device="cuda").bfloat16()
    )
    upstream = torch.randn(N, BLOCKS, COLUMNS, generator=generator, device="cuda").bfloat16()
    upstream[::2, :, :QUERIES] = 0
    upstream[400:, :, QUERIES:] = 0
    upstream = upstream.flatten(1)
    exact = torch.autograd.grad(
        F.linear(input.double(), weight.double()), (input, weight), upstream.double()
    )
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    linear_skipping_zero_rows(
        input, weight, gradient_accumulation_fusion=fused, blocks=BLOCKS, head_columns=head_columns
    ).backward(upstream)
    grad_weight = weight.main_grad - 1 if fused else weight.grad
    for value, reference in ((input.grad, exact[0]), (grad_weight, exact[1])):
        assert (value.double() - reference).norm() < 0.01 * reference.double().norm()


@pytest.mark.parametrize("rows", ["all", "last_layer", "every_layer_approximate"])
def test_a_decoders_gradients(groups, rows):
    """last_layer is exact; the approximation leaves the gradients of the last layer exact."""
    from megatron_slm.config.schema import Config
    from megatron_slm.model.build import build_model

    def gradients(backward_rows):
        config = Config()
        config.device.layers = "torch"
        config.model.hidden_size, config.model.ffn_hidden_size = 128, 352
        config.model.layers, config.model.query_groups = 2, 2
        config.selection.backward_rows = backward_rows
        (model,) = build_model(config, 500, groups)
        tokens = torch.arange(2 * 64, device="cuda").view(2, 64) % 500
        loss_BS = model(tokens, torch.zeros_like(tokens), None, labels=tokens.roll(-1, 1)).loss_BS
        (loss_BS * (torch.arange(64, device="cuda") % 5 < 3)).sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    exact, got = gradients("all"), gradients(rows)
    for name, reference in exact.items():
        if rows != "every_layer_approximate" or "layers.1." in name:
            assert (got[name] - reference).norm() < 1e-4 * reference.norm(), name
