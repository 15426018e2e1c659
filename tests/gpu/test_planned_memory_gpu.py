"""The planned memory against CUDA's allocator in one optimizer step. Skipped without CUDA."""

import multiprocessing

import pytest
import torch

from megatron_slm.config.load import from_mapping
from megatron_slm.planning.hardware import find_gpu
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import CONTEXT_BYTES, rank_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = 0.15


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layers", ["torch", "auto"])
def test_peak_of_one_step(recompute, layers):
    """A 0.4 B model, one GPU, two micro-batches of 4 x 2048 tokens in bf16.

    The step runs in a process of its own: in this one, whatever earlier tests still hold would be
    freed in the middle of the measurement and hide as much of the step's own memory.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        peak_bytes, planned_bytes = pool.apply(measured_and_planned_bytes, (recompute, layers))
    assert peak_bytes == pytest.approx(planned_bytes, rel=TOLERANCE)


def measured_and_planned_bytes(recompute: str, layers: str) -> tuple[int, int]:
    """The allocator's peak in one optimizer step, and what `plan` says of the same step."""
    from megatron_slm.accelerations import has_transformer_engine
    from megatron_slm.device import choose_device
    from megatron_slm.parallel import join_job, leave_job

    device = choose_device("cuda")
    config, problems = from_mapping(
        dict(
            device=dict(precision="bf16", layers=layers, kind="cuda"),
            model=dict(
                layers=16,
                hidden_size=1280,
                ffn_hidden_size=3456,
                attention_heads=20,
                query_groups=4,
                vocabulary_size=32000,
                recompute=recompute,
            ),
            data=dict(sequence_length=2048, micro_batch_size=4, global_batch_size=8),
        )
    )
    assert not problems
    groups = join_job(config.parallel, device, config.run.seed)
    try:
        measured_bytes = peak_bytes(config, groups)
    finally:
        leave_job()
    if layers == "auto" and not has_transformer_engine():
        config.device.layers = "torch"
    gpu = find_gpu(torch.cuda.get_device_name()) or find_gpu("H100")
    planned = rank_memory(Job(config, 32000, gpu, gpus_per_node=1), 0)
    return measured_bytes, planned.total - CONTEXT_BYTES


def peak_bytes(config, groups) -> int:
    from megatron_slm.data.batch import Batch
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_backward
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    models = wrap_data_parallel(build_model(config, 32000, groups), config)
    optimizer = build_optimizer(models, config)
    tokens_BS = torch.randint(0, 32000, (4, 2048), device="cuda")
    positions_BS = torch.arange(2048, device="cuda").expand(4, -1)
    batches = [
        Batch(
            tokens_BS,
            tokens_BS,
            torch.ones(4, 2048, device="cuda"),
            positions_BS,
            tokens_BS,
            torch.zeros(4, dtype=torch.int64),
        )
        for _ in range(2)
    ]

    def loss(index, batch, output):
        return (
            output.loss_BS[:, :1228].sum(),
            torch.tensor(4.0 * 1228, dtype=torch.float64, device="cuda"),
            {},
        )

    for _ in range(2):  # the second step has the optimizer's state from the beginning
        torch.cuda.reset_peak_memory_stats()
        for model in models:
            model.zero_grad_buffer()
        forward_backward(models, batches, loss, groups)
        peak = torch.cuda.max_memory_allocated() - before
        optimizer.step()
    return peak
