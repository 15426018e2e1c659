"""megatron-core's parallel linears with row-skipping backward give the gradients they gave before, with and without sequence parallelism."""

import pytest
import torch

from megatron_slm.ops.row_skipping import skip_zero_gradient_rows
from megatron_slm.testing.spawn import run_on_cpu

S, B, H = 8, 2, 16


def compare(groups, sequence_parallel: bool) -> None:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    torch.manual_seed(0)
    config = ModelParallelConfig(
        tensor_model_parallel_size=groups.tp.size(), sequence_parallel=sequence_parallel, use_cpu_initialization=True, perform_initialization=True
    )
    common = dict(config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=True)
    up = ColumnParallelLinear(H, 4 * H, gather_output=False, **common)
    down = RowParallelLinear(4 * H, H, input_is_parallel=True, **common)
    model = torch.nn.ModuleList([up, down])
    hidden, upstream = torch.randn(S, B, H), torch.randn(S, B, H)
    upstream[torch.rand(S, B) < 0.5] = 0.0
    if sequence_parallel:
        hidden, upstream = (tensor.chunk(groups.tp.size())[groups.tp.rank()] for tensor in (hidden, upstream))
    results = []
    for skipping in (False, True):
        if skipping:
            assert skip_zero_gradient_rows(model) == 2
        leaf = hidden.clone().requires_grad_()
        output = down(torch.nn.functional.gelu(up(leaf)[0]))[0]
        results.append((output.detach(), *torch.autograd.grad(output, (leaf, up.weight, down.weight), upstream)))
    for value, reference in zip(*reversed(results)):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parallel_linears(sequence_parallel):
    run_on_cpu(compare, sequence_parallel, tp=2, sequence_parallel=sequence_parallel)
