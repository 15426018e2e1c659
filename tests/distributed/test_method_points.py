"""Points of docs/method.md that need a model on several ranks.

They are empty ranks, padded vocabulary, precision of losses and modes. tests/test_method_points.py
is the index of all points.

One set of processes for all of them. B sequences, S tokens, V padded vocabulary.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.plain_trainer import PlainTrainer
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.bench import (
    LENGTH,
    VOCABULARY,
    local_steps,
    make_trainer,
    train,
    weights_of,
    whole_batch,
)

SEQUENCES = 4
KEEP = 0.6
LAYOUTS = {"single": {}, "dp2": dict(dp=2), "pp2": dict(pp=2), "tp2": dict(tp=2), "cp2": dict(cp=2)}


def make_config(groups, **model) -> Config:
    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        pad_vocabulary_to_multiple_of=64,
        initialization_std=0.1,
        **model,
    )
    config.data = dataclasses.replace(
        config.data, sequence_length=LENGTH, global_batch_size=SEQUENCES, micro_batch_size=1
    )
    config.parallel = dataclasses.replace(
        config.parallel, tensor=groups.tp_size, pipeline=groups.pp_size, context=groups.cp_size
    )
    config.selection = dataclasses.replace(
        config.selection, scorer="excess_loss", keep_fraction=KEEP
    )
    config.selection.reference.scores = ["synthetic"]
    config.schedule.train_steps = 3
    return config


class HalfEmpty:
    """Step 0: sequences 1 and 3 are masked (under dp2: all of rank 1). Step 1: no token of any rank
    is masked in or has a score. Step 2: ordinary.
    """

    def __len__(self):
        return 3 * SEQUENCES

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        step, sequence = divmod(index, SEQUENCES)
        text = random.integers(0, VOCABULARY, LENGTH + 1)
        reference = random.uniform(3, 5, LENGTH).astype(np.float32)
        mask = np.ones(LENGTH, np.float32)
        if sequence % 2 and step < 2:
            mask[:] = 0
        elif step == 1:
            reference[:] = np.nan
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": mask,
            "position_ids": np.arange(LENGTH),
            "corpus_id": np.int64(0),
            "reference_loss": reference,
        }


def train_half_empty(groups):
    """Three steps, each with whether all weights are finite after it; and the weights at the
    start.
    """
    config = make_config(groups)
    trainer = make_trainer(groups, config)
    before = weights_of(trainer)
    rows = []
    for step in train(trainer, config, local_steps(groups, config, HalfEmpty(), 3), rate=1e-3):
        finite = all(bool(weight.isfinite().all()) for weight in weights_of(trainer).values())
        rows.append((step, finite))
    return rows, before


def first_batches(groups) -> list:
    (batches,) = local_steps(groups, make_config(groups), HalfEmpty(), 1)
    return batches


def losses_before_and_after_poison(groups, *, trainable):
    """Largest change of losses and entropies when the padding rows of the output matrix become
    huge.
    """
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_losses

    models = build_model(make_config(groups), VOCABULARY, groups, trainable=trainable)
    batches = first_batches(groups)
    before = forward_losses(models, batches, groups, extras=("entropy",))
    if groups.is_last_stage:
        weight_VH = models[-1].output_layer.weight
        first = groups.tp_rank * weight_VH.shape[0]
        padding = torch.arange(first, first + weight_VH.shape[0]) >= VOCABULARY
        with torch.no_grad():
            weight_VH[padding] = 100 * torch.randn(
                int(padding.sum()), weight_VH.shape[1], generator=torch.Generator().manual_seed(0)
            )
    after = forward_losses(models, batches, groups, extras=("entropy",))
    changes = [
        float((old[name] - new[name]).abs().max())
        for old, new in zip(before, after, strict=True)
        for name in old
    ]
    return max(changes, default=0.0)


def losses_with_dropout(groups):
    """(losses of a model with dropout in its forward-only pass, twice, of the same weights without
    dropout, of a frozen model with it; the modes afterwards).
    """
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_losses

    batches = first_batches(groups)
    noisy = build_model(make_config(groups, dropout=0.5), VOCABULARY, groups)
    quiet = build_model(make_config(groups), VOCABULARY, groups)
    frozen = build_model(make_config(groups, dropout=0.5), VOCABULARY, groups, trainable=False)
    reads = []
    for models in (noisy, noisy, quiet, frozen):
        reads.append([output["loss"] for output in forward_losses(models, batches, groups)])
    trained = all(model.training for model in noisy)
    reference = any(model.training for model in frozen)
    with_gradients = any(p.requires_grad for model in frozen for p in model.parameters())
    modes = {"trained": trained, "reference": reference, "reference_gradients": with_gradients}
    return reads, modes


def bf16_losses(groups):
    """Losses of a bf16 model and of the same (rounded) weights in fp32."""
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_losses

    config = make_config(groups)
    config.device = dataclasses.replace(config.device, precision="bf16")
    batches = first_batches(groups)
    models = build_model(config, VOCABULARY, groups)
    return [output["loss"] for output in forward_losses(models, batches, groups)]


def every_point(groups, name):
    return {
        "last_stage": groups.is_last_stage,
        "empty": train_half_empty(groups),
        "dropout": losses_with_dropout(groups),
        "bf16": bf16_losses(groups),
        "poison": {
            trainable: losses_before_and_after_poison(groups, trainable=trainable)
            for trainable in (True, False)
        },
    }


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(every_point, LAYOUTS, side_by_side=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_point_03_a_rank_or_step_with_nothing_selected_is_legal(layout, results):
    """It neither hangs (this test ended) nor makes a NaN, and the tokens of the other ranks count
    in full.
    """
    ranks = results[layout]
    config = Config()
    config.model = dataclasses.replace(config.model, layers=2, hidden_size=32, ffn_hidden_size=48)
    start = results["single"][0]["empty"][1]
    plain = PlainTrainer(PlainDecoder(config.model, VOCABULARY, start), config.optimizer)
    batch = whole_batch(HalfEmpty(), range(SEQUENCES))
    plain_ids, _, plain_loss, plain_norm = plain.step(batch, [[0, 1], [2, 3]], KEEP, 1e-3)
    assert len(plain_ids) == 2 * math.ceil(KEEP * LENGTH)
    first, _, third = zip(*(rank["empty"][0] for rank in ranks if rank["last_stage"]), strict=True)
    assert set().union(*(step.selected for step, _ in first)) == plain_ids
    assert first[0][0].summary["loss/selected"] == pytest.approx(plain_loss, rel=2e-5)
    assert first[0][0].grad_norm == pytest.approx(plain_norm, rel=2e-4)
    for rank in ranks:
        rows = rank["empty"][0]
        empty, _ = rows[1]
        assert empty.selected == set()
        assert empty.grad_norm == 0.0, "nothing was selected, so there is no gradient"
        for step, weights_are_finite in rows:
            assert math.isfinite(step.grad_norm)
            assert weights_are_finite
    assert set().union(*(step.selected for step, _ in third)), (
        "the step after an empty one trains again"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_point_16_losses_are_fp32_from_fp32_logits_in_a_bf16_model(layout, results):
    losses = torch.cat([loss.flatten() for rank in results[layout] for loss in rank["bf16"]])
    assert losses.dtype == torch.float32
    assert (losses.bfloat16().float() != losses).float().mean() > 0.9, (
        "losses that bf16 can hold come from bf16 logits"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_point_17_padded_vocabulary_columns_are_minus_infinity_in_both_models(layout, results):
    for rank in results[layout]:
        assert rank["poison"] == {True: 0.0, False: 0.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_point_18_forward_only_passes_are_without_dropout(layout, results):
    for rank in results[layout]:
        (first, second, quiet, frozen), modes = rank["dropout"]
        for others in (second, quiet, frozen):
            # Memory alignment may move the last bit of a product.
            torch.testing.assert_close(others, first, rtol=1e-5, atol=1e-5)
        assert modes == {"trained": True, "reference": False, "reference_gradients": False}
