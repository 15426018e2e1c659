"""Training through the selective head, beside training through the head it replaces:
megatron-core's own, which materialises the logits.

The same model, data and settings in both. By default ten optimizer steps in the layouts named
below; with SLM_HEAD_STEPS=50, 50 steps in every fp32 layout of the layout table. Both runs are
free: each chooses from its own losses and follows its own gradients.
"""

import os
from unittest import mock

import pytest

from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.bench import (
    SyntheticSamples,
    local_steps,
    make_trainer,
    train,
)
from tests.distributed.test_layouts import EXACT, LAYOUTS, SEQUENCES, make_config

STEPS = int(os.environ.get("SLM_HEAD_STEPS", "10"))
FEW = (
    "single",
    "dp2_distributed_optimizer",
    "tp2_sequence_parallel",
    "pp2_virtual2",
    "cp2",
    "tp2_pp2",
)
TRIED = {name: LAYOUTS[name] for name in (EXACT if "SLM_HEAD_STEPS" in os.environ else FEW)}
VOCABULARY = 64  # no padded columns: megatron-core's head would give them probability
APART_NATS = 2e-3  # rounding of the first steps, grown by the optimizer steps that follow


def with_both_heads(groups, name):
    from megatron.core.models.gpt import GPTModel

    from megatron_slm.model.decoder import Decoder

    config = make_config("data_parallel", TRIED[name])
    ours = take_steps(groups, config)
    with mock.patch.object(Decoder, "_postprocess", GPTModel._postprocess):
        materialised = take_steps(groups, config)
    watched = groups.is_last_stage and groups.tp_rank == 0
    return {"ours": ours, "materialised": materialised} if watched else None


def take_steps(groups, config):
    trainer = make_trainer(groups, config, VOCABULARY)
    batches = local_steps(groups, config, SyntheticSamples(STEPS * SEQUENCES), STEPS)
    return list(train(trainer, config, batches, note=losses_and_margins))


def losses_and_margins(batch, outputs, selection) -> dict[int, tuple[float, float, bool]]:
    """Token id -> (loss, score less threshold, selected)."""
    loss_BS = outputs["loss"].detach()
    margin_BS = loss_BS - batch.columns["reference_loss"] - selection.threshold
    columns = (loss_BS, margin_BS, selection.mask)
    values = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return dict(zip(batch.token_id_BS.flatten().tolist(), values, strict=True))


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(with_both_heads, TRIED, side_by_side=True)


@pytest.mark.parametrize("name", TRIED)
def test_losses_and_selected_sets_are_those_of_the_materialised_head(name, results):
    ranks = [rank for rank in results[name] if rank is not None]
    assert ranks
    for rank in ranks:
        pairs = zip(rank["ours"], rank["materialised"], strict=True)
        for step, (ours, materialised) in enumerate(pairs):
            assert ours.summary["loss/selected"] == pytest.approx(
                materialised.summary["loss/selected"], abs=APART_NATS
            ), f"step {step}"
            assert ours.grad_norm == pytest.approx(materialised.grad_norm, rel=1e-2), (
                f"step {step}: another gradient norm"
            )
            for tokens, others in zip(ours.noted, materialised.noted, strict=True):
                assert tokens.keys() == others.keys()
                for token, found in tokens.items():
                    compare_token(f"step {step}, token {token}", found, others[token])


def compare_token(name, ours, materialised):
    loss, margin, selected = ours
    other_loss, other_margin, other_selected = materialised
    assert abs(loss - other_loss) <= APART_NATS, name
    if selected != other_selected:
        assert max(abs(margin), abs(other_margin)) <= APART_NATS, f"{name}: far from the threshold"
