"""Head and backward on selected rows, in training, through the configuration: each layout against
plain single-process torch.

The exact ones against the plain method; every_layer_approximate against the approximation it says
it is, written in plain torch. B sequences, S tokens.
"""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.plain_trainer import PlainTrainer
from megatron_slm.testing.selection_oracle import top_tokens
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.bench import (
    LENGTH,
    VOCABULARY,
    SyntheticSamples,
    assert_same_step,
    local_steps,
    make_trainer,
    rows_in_populations,
    train,
    weights_of,
    whole_batch,
)
from tests.distributed.test_layouts import KEEP, POPULATION, SEQUENCES, make_config

STEPS = 2
LAYOUTS = {
    "single": {},
    "dp2": dict(dp=2),
    "tp2_sequence_parallel": dict(tp=2, sequence_parallel=True),
    "tp2_pp2": dict(tp=2, pp=2),
    "pp2_virtual2": dict(pp=2, vpp=2),
    "cp2": dict(cp=2),
    "tp2_cp2_sequence_parallel": dict(tp=2, cp=2, sequence_parallel=True),
}
STATIC = dict(scorer="reference_loss", head_rows="selected")
CASES = {
    "static": STATIC,
    "static_all_rows": {**STATIC, "head_rows": "all"},
    "static_sequence": {**STATIC, "scope": "sequence"},
    "static_global_batch": {**STATIC, "scope": "global_batch"},
    "weights": dict(
        scorer="stored_weight", scorer_options={"column": "quality"}, head_rows="selected"
    ),
    "global_batch": dict(scope="global_batch"),
    "last_layer": dict(backward_rows="last_layer"),
    "everything": {**STATIC, "backward_rows": "last_layer"},
    "approximate": dict(backward_rows="every_layer_approximate"),
}


class Samples(SyntheticSamples):
    """With a stored weight of each token, some zero; sample 5 has no token that counts, so one
    micro-batch and some ranks may have none selected.
    """

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        random = np.random.default_rng(500 + index)
        weight = random.uniform(0.5, 2, LENGTH)
        kept = random.random(LENGTH) > 0.4
        sample["quality"] = (weight * kept).astype(np.float32)
        if index % SEQUENCES == 5:
            sample["loss_mask"] = np.zeros(LENGTH, np.float32)
        return sample


SAMPLES = Samples(STEPS * SEQUENCES)


def configured(case: str, layout: dict):
    config = make_config("data_parallel", layout)
    config.model = dataclasses.replace(
        config.model,
        tied_embeddings=case in ("static", "static_all_rows"),
        qkv_bias=case == "last_layer",
        qk_norm=case == "last_layer",
    )
    config.selection = dataclasses.replace(config.selection, **CASES[case])
    config.schedule.train_steps = STEPS
    return config


def every_case(groups, name):
    return {case: train_case(groups, configured(case, LAYOUTS[name])) for case in CASES}


def train_case(groups, config):
    trainer = make_trainer(groups, config)
    return {
        "before": weights_of(trainer),
        "steps": list(train(trainer, config, local_steps(groups, config, SAMPLES, STEPS))),
        "after": weights_of(trainer),
        "last_stage": groups.is_last_stage,
    }


class DroppingDecoder(PlainDecoder):
    """Gives tokens outside `selected_BS` no gradient at any layer's entry: what
    every_layer_approximate computes.
    """

    selected_BS = None

    def _layer(self, hidden_BSH, *arguments, **more):
        if self.selected_BS is not None:
            hidden_BSH = torch.where(self.selected_BS[..., None], hidden_BSH, hidden_BSH.detach())
        return super()._layer(hidden_BSH, *arguments, **more)


def plain_rows(case: str, state: dict):
    """The same steps in plain torch: per step (ids, loss of the selected, gradient norm, losses,
    which tokens are eligible), and the final weights.
    """
    from megatron_slm.training.learning_rate import learning_rate

    config = configured(case, {})
    rows = []
    decoder = DroppingDecoder(config.model, VOCABULARY, state)
    trainer = PlainTrainer(decoder, config.optimizer)
    populations = rows_in_populations(config.selection.scope, SEQUENCES, POPULATION)
    for step in range(STEPS):
        batch = whole_batch(SAMPLES, range(step * SEQUENCES, (step + 1) * SEQUENCES))
        loss_GS = decoder.loss(batch["tokens"], batch["labels"])
        weight_GS = plain_weights(config, batch, loss_GS.detach(), populations)
        if case == "approximate":
            decoder.selected_BS = weight_GS > 0
            loss_GS = decoder.loss(batch["tokens"], batch["labels"])
            decoder.selected_BS = None
        loss, norm = trainer.update(loss_GS, weight_GS, learning_rate(config, step + 1, STEPS))
        selected = set(weight_GS.flatten().nonzero().flatten().tolist())
        rows.append((selected, loss, norm, loss_GS.detach(), batch["loss_mask"] > 0))
    return rows, {name: decoder.weight(name).detach() for name in decoder.names}


def plain_weights(config, batch, loss_GS, populations):
    eligible_GS = batch["loss_mask"] > 0
    ids_GS = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH)
    if config.selection.scorer == "stored_weight":
        return batch["quality"] * eligible_GS
    score_GS = -batch["reference_loss"] + (
        loss_GS if config.selection.scorer == "excess_loss" else 0.0
    )
    kept = [
        top_tokens(
            score_GS[rows].flatten().tolist(),
            ids_GS[rows].flatten().tolist(),
            eligible_GS[rows].flatten().tolist(),
            KEEP,
        )
        for rows in populations
    ]
    return torch.isin(ids_GS, torch.tensor(sorted(set().union(*kept)))).float()


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(every_case, LAYOUTS, side_by_side=True)


@pytest.fixture(scope="module")
def plain(results):
    return {case: plain_rows(case, results["single"][0][case]["before"]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_plain_torch(name, case, results, plain):
    ranks = [rank[case] for rank in results[name]]
    for step, (selected, loss, norm, _, _) in enumerate(plain[case][0]):
        last_stage = assert_same_step(ranks, step, selected, norm)
        if case != "weights":  # there, loss/selected is the plain mean of the chosen
            assert last_stage[0].summary["loss/selected"] == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["single", "dp2", "cp2"])
def test_weights_after_the_steps_equal_plain_torch(name, case, results, plain):
    for rank in results[name]:
        for weight, expected in plain[case][1].items():
            torch.testing.assert_close(rank[case]["after"][weight], expected, rtol=2e-3, atol=2e-4)


def test_the_approximation_is_one(plain):
    """Its gradients differ from the exact ones: a backward that dropped nothing would pass for
    neither.
    """
    exact = plain["global_batch"][0]
    approximate = plain["approximate"][0]
    assert abs(exact[0][2] / approximate[0][2] - 1) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_of_unselected_tokens_are_right_or_absent(name, results, plain):
    unknown = {
        "loss/all",
        "loss/rejected",
        "selection/positive_excess_fraction",
        "selection/absolute_excess_nats",
    }
    for rank in results[name]:
        if not rank["static"]["last_stage"]:
            continue
        for step, (_, _, _, loss_GS, eligible_GS) in enumerate(plain["global_batch"][0]):
            loss_all = rank["global_batch"]["steps"][step].summary["loss/all"]
            assert loss_all == pytest.approx(float(loss_GS[eligible_GS].mean()), rel=2e-5), (
                "from the forward pass that chose"
            )
        for step in range(STEPS):
            all_rows = rank["static_all_rows"]["steps"][step].summary
            selected_only = rank["static"]["steps"][step].summary
            assert set(all_rows) - set(selected_only) == unknown
            for metric, value in selected_only.items():
                assert value == pytest.approx(all_rows[metric], rel=2e-5, nan_ok=True), metric


@pytest.mark.parametrize("name", LAYOUTS)
def test_selected_rows_give_what_all_rows_give(name, results):
    for rank in results[name]:
        for step in range(STEPS):
            selected_only = rank["static"]["steps"][step]
            all_rows = rank["static_all_rows"]["steps"][step]
            assert selected_only.noted == all_rows.noted
            assert selected_only.grad_norm == pytest.approx(all_rows.grad_norm, rel=1e-5)
