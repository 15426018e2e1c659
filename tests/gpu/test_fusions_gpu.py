"""Fused passes of a GPU's training step against the same in plain torch. Skipped without CUDA."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_slm.accelerations import has_transformer_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_engine = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_transformer_engine(),
    reason="needs Transformer Engine",
)
TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


def small_bench(groups):
    from benchmarks.step_sides import Bench, Shape

    return Bench(
        Shape(
            layers=2,
            hidden=256,
            feed_forward=704,
            heads=4,
            query_groups=2,
            vocabulary=2048,
            sequence_tokens=128,
            sequences=2,
            precision="bf16",
        ),
        groups,
    )


def inner_optimizers(trainer) -> list:
    return [part.optimizer for part in trainer.optimizer.chained_optimizers]


def main_weights(trainer) -> list[torch.Tensor]:
    return [
        parameter.detach().clone()
        for optimizer in inner_optimizers(trainer)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def steps(bench, trainer, count: int) -> None:
    from benchmarks.step_sides import PROGRESS
    from megatron_slm.training.step import train_step

    for _ in range(count):
        assert train_step(trainer, [bench.own_batch()], PROGRESS, 1e-3).updated


def test_fused_updates_are_torchs(groups):
    bench = small_bench(groups)
    fused, plain = (bench.trainer(bench.config) for _ in range(2))
    if not all(isinstance(each, torch.optim.AdamW) for each in inner_optimizers(fused)):
        pytest.skip("Transformer Engine's or apex's Adam is used")
    for optimizer in inner_optimizers(plain):
        for group in optimizer.param_groups:
            group["fused"] = False
    for trainer in (fused, plain):
        steps(bench, trainer, 3)
    for left, right in zip(main_weights(fused), main_weights(plain), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_a_run_resumes_to_the_bit(groups, tmp_path):
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state

    bench = small_bench(groups)
    trainer = bench.trainer(bench.config)
    steps(bench, trainer, 2)
    store = CheckpointStore(tmp_path, groups)
    store.save(
        trainer.models,
        trainer.optimizer,
        CheckpointInfo(dataclasses.asdict(bench.config.model), 2048, {}, 2, 0),
        trainer_state(trainer.optimizer, groups, step=2),
    )
    store.close()
    resumed = bench.trainer(bench.config)
    store.load_latest(resumed.models, resumed.optimizer)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for each in (trainer, resumed):
            steps(bench, each, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    for left, right in zip(main_weights(resumed), main_weights(trainer), strict=True):
        assert torch.equal(left, right)


@needs_engine
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_transformer_engines_rotary_embedding_is_torchs(dtype, tolerance):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    angle_S11D = torch.rand(64, 1, 1, 32, device="cuda") * 6.0
    results = []
    for fused in (True, False):
        config = SimpleNamespace(
            apply_rope_fusion=fused,
            rotary_interleaved=False,
            mrope_section=None,
            multi_latent_attention=False,
        )
        generator = torch.Generator("cuda").manual_seed(0)
        query = torch.randn(64, 2, 4, 32, generator=generator, device="cuda", dtype=dtype)
        query.requires_grad_()
        turned = apply_rotary_pos_emb(query, angle_S11D, config, cp_group=object())
        turned.float().pow(3).sum().backward()
        results.append((turned.detach().float(), query.grad.float()))
    for left, right in zip(*results, strict=True):
        assert (left - right).norm() <= tolerance * right.norm()


@needs_engine
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_transformer_engines_swiglu_is_torchs(dtype, tolerance):
    from megatron_slm.model.layers import EngineSwiGLU

    results = []
    for fused in (True, False):
        generator = torch.Generator("cuda").manual_seed(0)
        halves = torch.randn(64, 2, 256, generator=generator, device="cuda", dtype=dtype)
        halves.requires_grad_()
        if fused:
            output = EngineSwiGLU(None)(halves)
        else:
            gate, value = halves.chunk(2, -1)
            output = torch.nn.functional.silu(gate) * value
        output.float().pow(2).sum().backward()
        results.append((output.detach().float(), halves.grad.float()))
    for left, right in zip(*results, strict=True):
        assert (left - right).norm() <= tolerance * right.norm()


@needs_engine
def test_layers_add_their_gradients_in_their_products(groups):
    bench = small_bench(groups)
    trainer = bench.trainer(bench.config)
    steps(bench, trainer, 1)
    (model,) = trainer.models
    flags = [
        module.fuse_wgrad_accumulation
        for module in model.modules()
        if hasattr(module, "fuse_wgrad_accumulation")
    ]
    assert flags
    assert all(flags)
