"""megatron-core's parallel linears with row-skipping backward give the gradients they gave before,
with and without sequence parallelism.
"""

import pytest
import torch

from megatron_slm.ops.row_skipping import skip_zero_gradient_rows
from megatron_slm.testing.spawn import run_on_cpu
from tests.distributed.test_layouts import LENGTH, VOCABULARY, make_config

S = 8
B = 2
H = 16


def compare(groups, sequence_parallel: bool) -> None:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    torch.manual_seed(0)
    config = ModelParallelConfig(
        tensor_model_parallel_size=groups.tp.size(),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=True,
    )
    common = dict(config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=True)
    up = ColumnParallelLinear(H, 4 * H, gather_output=False, **common)
    down = RowParallelLinear(4 * H, H, input_is_parallel=True, **common)
    model = torch.nn.ModuleList([up, down])
    hidden = torch.randn(S, B, H)
    upstream = torch.randn(S, B, H)
    upstream[torch.rand(S, B) < 0.5] = 0.0
    if sequence_parallel:
        hidden, upstream = (
            tensor.chunk(groups.tp.size())[groups.tp.rank()] for tensor in (hidden, upstream)
        )
    results = []
    for skipping in (False, True):
        if skipping:
            assert skip_zero_gradient_rows(model) == 2
        leaf = hidden.clone().requires_grad_()
        output = down(torch.nn.functional.gelu(up(leaf)[0]))[0]
        results.append(
            (
                output.detach(),
                *torch.autograd.grad(output, (leaf, up.weight, down.weight), upstream),
            )
        )
    for value, reference in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parallel_linears(sequence_parallel):
    run_on_cpu(compare, sequence_parallel, tp=2, sequence_parallel=sequence_parallel)


def gradients(groups) -> dict:
    """Of a real decoder, for each selection.backward_rows: the gradient of the 60 % of tokens with
    the highest loss, by layer, on this tensor rank.
    """
    from megatron_slm.model.build import build_model

    config = make_config("data_parallel", dict(tp=2, sequence_parallel=True))
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=generator)
    found = {}
    for rows in ("all", "last_layer", "every_layer_approximate"):
        config.selection.backward_rows = rows
        (model,) = build_model(config, VOCABULARY, groups)
        positions_BS = torch.arange(LENGTH).expand(4, -1)
        loss_BS = model(text[:, :-1], positions_BS, None, labels=text[:, 1:]).loss_BS
        (loss_BS * (loss_BS >= loss_BS.detach().quantile(0.4))).sum().backward()
        found[rows] = {}
        layers = {str(layer): f"layers.{layer}." for layer in range(config.model.layers)}
        for layer, part in {**layers, "embedding": "embedding", "head": "output_layer"}.items():
            weights = [weight for name, weight in model.named_parameters() if part in name]
            found[rows][layer] = torch.cat([weight.grad.flatten() for weight in weights])
    return found


def test_every_layer_approximate_points_the_same_way_and_last_layer_is_exact():
    for found in run_on_cpu(gradients, tp=2, sequence_parallel=True):
        for layer, exact in found["all"].items():
            torch.testing.assert_close(found["last_layer"][layer], exact, rtol=1e-4, atol=1e-5)
            cosine = torch.cosine_similarity(found["every_layer_approximate"][layer], exact, dim=0)
            if layer in ("3", "head"):
                torch.testing.assert_close(
                    found["every_layer_approximate"][layer], exact, rtol=1e-4, atol=1e-5
                )  # nothing is lost above it
            else:
                assert 0.7 < cosine < 0.9999, f"layer {layer}: {cosine}"
