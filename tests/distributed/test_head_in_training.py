"""Training through the selective head, beside training through the head it replaces: megatron-core's own, which materialises the logits.

The same model, data and settings in both. By default ten optimizer steps in the layouts named below; with SLM_HEAD_STEPS=50, 50 steps in every
fp32 layout of the layout table. Both runs are free: each chooses from its own losses and follows its own gradients.
"""

import os
from unittest import mock

import pytest

from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.test_layouts import EXACT, LAYOUTS, SyntheticSamples, make_config
from tests.distributed.test_rows_in_training import take_layout, train

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


class Samples(SyntheticSamples):
    def __len__(self):
        return STEPS * 8


def with_both_heads(groups, layouts):
    from megatron.core.models.gpt import GPTModel

    from megatron_slm.model.decoder import Decoder

    config = make_config("data_parallel", take_layout(groups, layouts))
    ours = train(groups, config, Samples(), STEPS, VOCABULARY, note_scores)
    with mock.patch.object(Decoder, "_postprocess", GPTModel._postprocess):
        materialised = train(groups, config, Samples(), STEPS, VOCABULARY, note_scores)
    return (
        {"ours": ours["rows"], "materialised": materialised["rows"]}
        if groups.is_last_stage and groups.tp_rank == 0
        else None
    )


def note_scores(selector, noted):
    """Of every micro-batch: token id -> (loss, score less threshold, selected)."""
    describe = selector.describe

    def noting(batch, outputs, selection, progress):
        loss_BS = outputs["loss"].detach()
        margin_BS = loss_BS - batch.columns["reference_loss"] - selection.threshold
        noted.append(
            dict(
                zip(
                    batch.token_id_BS.flatten().tolist(),
                    zip(
                        loss_BS.flatten().tolist(),
                        margin_BS.flatten().tolist(),
                        selection.mask.flatten().tolist(),
                        strict=True,
                    ),
                    strict=True,
                )
            )
        )
        return describe(batch, outputs, selection, progress)

    selector.describe = noting


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(with_both_heads, TRIED, dict(TRIED))


@pytest.mark.parametrize("name", TRIED)
def test_losses_and_selected_sets_are_those_of_the_materialised_head(name, results):
    ranks = [rank for rank in results[name] if rank is not None]
    assert ranks
    for rank in ranks:
        for step, (ours, materialised) in enumerate(
            zip(rank["ours"], rank["materialised"], strict=True)
        ):
            assert ours[1]["loss/selected"] == pytest.approx(
                materialised[1]["loss/selected"], abs=APART_NATS
            ), f"step {step}"
            assert ours[2] == pytest.approx(materialised[2], rel=1e-2), (
                f"step {step}: another gradient norm"
            )
            for tokens, others in zip(ours[0], materialised[0], strict=True):
                assert tokens.keys() == others.keys()
                for token, (loss, margin, selected) in tokens.items():
                    other_loss, other_margin, other_selected = others[token]
                    assert abs(loss - other_loss) <= APART_NATS, f"step {step}, token {token}"
                    if selected != other_selected:
                        assert max(abs(margin), abs(other_margin)) <= APART_NATS, (
                            f"step {step}: token {token} is far from the threshold"
                        )
