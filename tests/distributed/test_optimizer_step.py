"""What happens between the last backward and the next forward: the norm of the gradients, clipping,
fused updates, weights gathered while forward runs.
"""

import dataclasses
from functools import partial

import pytest
import torch

from megatron_slm.testing.spawn import run_layouts_on_cpu, run_on_cpu
from tests.distributed import test_experts, test_layouts
from tests.distributed.bench import (
    SyntheticSamples,
    local_steps,
    make_trainer,
    train,
    weights_of,
)

SEQUENCES = test_layouts.SEQUENCES


def dense(layout: dict):
    config = test_layouts.make_config("sequence" if "tied" in layout else "clm", layout)
    config.optimizer.clip_grad_norm = 0.01
    return config


def of_experts(layout: dict):
    config = test_experts.make_config("slm_sequence", layout)
    config.optimizer.clip_grad_norm = 0.01
    return config


NORMS = {
    "tp2": dict(tp=2, sequence_parallel=True, make=dense),
    "tied over two stages": dict(pp=2, tied=True, make=dense),
    "experts": dict(dp=2, ep=2, make=of_experts),
    "slices": dict(dp=2, distributed_optimizer=True, precision="bf16", make=dense),
}


def norms_and_clipped(groups, name) -> dict:
    """(norm, clipped gradients) by us and by megatron-core, from the same gradients."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    from megatron_slm.model.gradient_norm import clip_gradients, gradient_norm

    layout = NORMS[name]
    config = layout["make"](layout)
    trainer = make_trainer(groups, config)
    samples = SyntheticSamples(SEQUENCES)
    list(train(trainer, config, local_steps(groups, config, samples, 1)))
    parts = trainer.optimizer.chained_optimizers
    gradients = [p.grad for part in parts for p in part.get_parameters() if p.grad is not None]
    for gradient in gradients:  # other values than those that the step has clipped
        gradient.mul_(3.0)
    before = [gradient.clone() for gradient in gradients]
    theirs = float(trainer.optimizer.get_grad_norm())
    for part in parts:
        clip_grad_by_total_norm_fp32(part.get_parameters(), 0.01, theirs)
    clipped = [gradient.clone() for gradient in gradients]
    for gradient, value in zip(gradients, before, strict=True):
        gradient.copy_(value)
    ours = gradient_norm(trainer.optimizer)
    clip_gradients(trainer.optimizer, ours)
    differences = [(a != b).sum().item() for a, b in zip(gradients, clipped, strict=True)]
    return {"ours": ours, "theirs": theirs, "differences": sum(differences), "parts": len(parts)}


@pytest.fixture(scope="module")
def norms():
    return run_layouts_on_cpu(norms_and_clipped, NORMS)


@pytest.mark.parametrize("name", NORMS)
def test_norm_and_clipping_have_the_bits_of_megatron_cores(norms, name):
    for rank in norms[name]:
        assert rank["ours"] == rank["theirs"] == norms[name][0]["ours"]
        assert rank["ours"] > 0.01, "nothing was clipped"
        assert rank["differences"] == 0
    assert norms["experts"][0]["parts"] == 2


def four_steps(groups, fused: bool, folder, resume_after: int) -> tuple:
    """(gradient norms, weights at the end, updates counted) of four steps, resumed after some."""
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.model.optimizer import fuse_updates

    config = test_layouts.make_config("clm", dict(distributed_optimizer=True, precision="bf16"))
    samples = SyntheticSamples(4 * SEQUENCES)

    def fresh():
        trainer = make_trainer(groups, config)
        if fused:
            fuse_updates(trainer.optimizer)
        return trainer

    trainer = fresh()
    norms = []
    for step, batches in enumerate(local_steps(groups, config, samples, 4)):
        if step == resume_after:
            store = CheckpointStore(folder, groups)
            store.save(
                trainer.models,
                trainer.optimizer,
                CheckpointInfo(dataclasses.asdict(config.model), 50, {}, step, 0),
                trainer_state(trainer.optimizer, groups, step=step),
            )
            store.close()
            trainer = fresh()
            store.load_latest(trainer.models, trainer.optimizer)
        (record,) = train(trainer, config, [batches], first=step)
        norms.append(record.grad_norm)
    states = trainer.optimizer.chained_optimizers[0].optimizer.state.values()
    return norms, weights_of(trainer), [float(state["step"]) for state in states]


def fused_and_not(groups, folder) -> dict:
    return {
        (fused, resume_after): four_steps(groups, fused, folder / f"{fused}", resume_after)
        for fused in (True, False)
        for resume_after in (2, 4)
    }


def test_a_run_with_fused_updates_resumes_to_the_bit(tmp_path):
    (found,) = run_on_cpu(fused_and_not, tmp_path)
    for fused in (True, False):
        norms, weights, steps = found[fused, 2]
        expected_norms, expected_weights, expected_steps = found[fused, 4]
        assert norms == expected_norms
        assert steps == expected_steps
        assert set(steps) == {4.0}
        for name, weight in weights.items():
            assert torch.equal(weight, expected_weights[name]), name
    assert found[True, 4][0] == pytest.approx(found[False, 4][0], rel=1e-3)


OVERLAP = {
    "whole": dict(dp=2, distributed_optimizer=True),
    "buckets": dict(dp=2, distributed_optimizer=True, overlap=True),
}


def train_in_small_buckets(groups, name) -> dict:
    """The weights after four steps, where the head's weight has a bucket of its own, as it has in
    any model of a real size.
    """
    from megatron_slm.model import optimizer

    layout = OVERLAP[name]
    samples = SyntheticSamples(4 * SEQUENCES)
    whole = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(whole, bucket_size=500)
    try:
        found = {}
        for case in ("clm", "sequence"):  # the second has tied embeddings
            config = test_layouts.make_config(case, layout)
            # The norm adds slices, and these differ with the buckets.
            config.optimizer.clip_grad_norm = 0.0
            trainer = make_trainer(groups, config)
            list(train(trainer, config, local_steps(groups, config, samples, 4)))
            if layout.get("overlap"):  # the last update's gather is still under way
                for model in trainer.models:
                    model.disable_forward_pre_hook()
            found[case] = weights_of(trainer)
        return found
    finally:
        optimizer.DistributedDataParallelConfig = whole


def test_the_head_waits_for_its_gathered_weight():
    """Two ranks add the same numbers in either order: every bit must be that of the run that
    gathers nothing while it computes.
    """
    results = run_layouts_on_cpu(train_in_small_buckets, OVERLAP)
    for whole, buckets in zip(results["whole"], results["buckets"], strict=True):
        for case, weights in whole.items():
            for name, weight in weights.items():
                assert torch.equal(buckets[case][name], weight), (case, name)
