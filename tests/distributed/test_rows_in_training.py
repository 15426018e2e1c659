"""Head and backward on selected rows, in training, through the configuration: each layout against plain single-process torch.

The exact ones against the plain method; every_layer_approximate against the approximation it says it is, written in plain torch.
B sequences, S tokens.
"""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_slm.testing.plain import PlainDecoder, PlainTrainer
from megatron_slm.testing.selection_oracle import top_tokens
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.test_layouts import (
    KEEP,
    LENGTH,
    POPULATION,
    SEQUENCES,
    VOCABULARY,
    SyntheticSamples,
    make_config,
    spy_on_selection,
)

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
    """With a stored weight of each token, some zero; sample 5 has no token that counts, so one micro-batch and some ranks may have none selected."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        random = np.random.default_rng(500 + index)
        sample["quality"] = (random.uniform(0.5, 2, LENGTH) * (random.random(LENGTH) > 0.4)).astype(
            np.float32
        )
        return (
            sample
            if index % SEQUENCES != 5
            else {**sample, "loss_mask": np.zeros(LENGTH, np.float32)}
        )


def configured(case: str, layout: dict):
    config = make_config("data_parallel", layout)
    config.model = dataclasses.replace(
        config.model,
        tied_embeddings=case in ("static", "static_all_rows"),
        qkv_bias=case == "last_layer",
        qk_norm=case == "last_layer",
    )
    config.selection = dataclasses.replace(config.selection, **CASES[case])
    return config


def train(
    groups,
    config,
    samples,
    steps: int,
    vocabulary_size: int = VOCABULARY,
    watch=lambda selector, chosen: spy_on_selection(selector, chosen),
):
    """Real steps: per step (what `watch` noted, summary of the metrics, gradient norm); initial and final weights by name."""
    from megatron.core.utils import unwrap_model

    from megatron_slm.data.batch import slice_for_context_parallel
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.learning_rate import learning_rate
    from megatron_slm.training.step import Trainer, train_step
    from megatron_slm.training.token_selector import TokenSelector

    models = wrap_data_parallel(build_model(config, vocabulary_size, groups), config)
    trainer = Trainer(
        models,
        build_optimizer(models, config),
        TokenSelector(config.selection, groups, sequence_length=LENGTH, corpora=1),
        groups,
    )
    loader = TrainingLoader(
        samples,
        global_batch_size=SEQUENCES,
        micro_batch_size=config.data.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
    )
    noted, rows, metrics = [], [], Metrics(groups.device)

    def weights():
        return {
            name: p.detach().clone()
            for chunk in unwrap_model(models)
            for name, p in chunk.named_parameters()
        }

    before = weights()
    watch(trainer.selector, noted)
    for step in range(steps):
        batches = [
            slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size)
            for batch in loader.next_step()
        ]
        report = train_step(
            trainer,
            batches,
            TrainingProgress(step, step * SEQUENCES * LENGTH),
            learning_rate(config, step + 1, STEPS),
        )
        metrics.add_all(report.measured)
        rows.append(
            (list(noted), metrics.reduce(groups.dp_cp, summarise=summarise), report.grad_norm)
        )
        noted.clear()
    loader.close()
    return {"rows": rows, "before": before, "after": weights(), "last_stage": groups.is_last_stage}


def every_case(groups, layouts):
    layout = take_layout(groups, layouts)
    return {case: train(groups, configured(case, layout), Samples(), STEPS) for case in CASES}


def take_layout(groups, layouts: dict) -> dict:
    """The layout this process is in now, taken out of its own copy of the table: layouts of the same sizes come in the table's order."""
    sizes = dict(
        tp=groups.tp_size,
        pp=groups.pp_size,
        vpp=groups.virtual_chunks,
        cp=groups.cp_size,
        dp=groups.dp_size,
    )
    return layouts.pop(
        next(
            name
            for name, spec in layouts.items()
            if all(spec.get(axis, 1) == size for axis, size in sizes.items())
        )
    )


class DroppingDecoder(PlainDecoder):
    """Gives tokens outside `selected_BS` no gradient at any layer's entry: what every_layer_approximate computes."""

    selected_BS = None

    def _layer(self, hidden_BSH, *arguments, **more):
        if self.selected_BS is not None:
            hidden_BSH = torch.where(self.selected_BS[..., None], hidden_BSH, hidden_BSH.detach())
        return super()._layer(hidden_BSH, *arguments, **more)


def plain_rows(case: str, state: dict):
    """The same steps in plain torch: per step (ids, loss of the selected, gradient norm), and the final weights."""
    from megatron_slm.training.learning_rate import learning_rate

    config, samples, rows = configured(case, {}), Samples(), []
    decoder = DroppingDecoder(config.model, VOCABULARY, state)
    trainer = PlainTrainer(decoder, config.optimizer)
    everything = list(range(SEQUENCES))
    populations = {"sequence": [[row] for row in everything], "global_batch": [everything]}.get(
        config.selection.scope,
        [everything[i : i + POPULATION] for i in range(0, SEQUENCES, POPULATION)],
    )
    for step in range(STEPS):
        picked = [samples[step * SEQUENCES + i] for i in everything]
        batch = {
            name: torch.from_numpy(np.stack([sample[name] for sample in picked]))
            for name in picked[0]
        }
        loss_GS = decoder.loss(batch["tokens"], batch["labels"])
        weight_GS = plain_weights(config, batch, loss_GS.detach(), populations)
        if case == "approximate":
            decoder.selected_BS = weight_GS > 0
            loss_GS, decoder.selected_BS = decoder.loss(batch["tokens"], batch["labels"]), None
        loss, norm = trainer.update(loss_GS, weight_GS, learning_rate(config, step + 1, STEPS))
        rows.append(
            (
                set(weight_GS.flatten().nonzero().flatten().tolist()),
                loss,
                norm,
                loss_GS.detach(),
                batch["loss_mask"] > 0,
            )
        )
    return rows, {name: decoder.weight(name).detach() for name in decoder.names}


def plain_weights(config, batch, loss_GS, populations):
    eligible_GS, ids_GS = (
        batch["loss_mask"] > 0,
        torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH),
    )
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
    return run_layouts_on_cpu(every_case, LAYOUTS, dict(LAYOUTS))


@pytest.fixture(scope="module")
def plain(results):
    return {case: plain_rows(case, results["single"][0][case]["before"]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_plain_torch(name, case, results, plain):
    ranks = [rank[case] for rank in results[name]]
    last_stage = [rank for rank in ranks if rank["last_stage"]]
    for step, (selected, loss, norm, _, _) in enumerate(plain[case][0]):
        assert (
            set().union(*(ids for rank in last_stage for ids in rank["rows"][step][0])) == selected
        ), f"step {step}: another set of tokens"
        for rank in ranks:
            assert rank["rows"][step][2] == pytest.approx(norm, rel=2e-4), (
                f"step {step}: another gradient norm"
            )
        if case != "weights":  # there, loss/selected is the plain mean of the chosen
            assert last_stage[0]["rows"][step][1]["loss/selected"] == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["single", "dp2", "cp2"])
def test_weights_after_the_steps_equal_plain_torch(name, case, results, plain):
    for rank in results[name]:
        for weight, expected in plain[case][1].items():
            torch.testing.assert_close(rank[case]["after"][weight], expected, rtol=2e-3, atol=2e-4)


def test_the_approximation_is_one(plain):
    """Its gradients differ from the exact ones: a backward that dropped nothing would pass for neither."""
    exact, approximate = plain["global_batch"][0], plain["approximate"][0]
    assert abs(exact[0][2] / approximate[0][2] - 1) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_of_unselected_tokens_are_right_or_absent(name, results, plain):
    for rank in results[name]:
        if not rank["static"]["last_stage"]:
            continue
        for step, (_, _, _, loss_GS, eligible_GS) in enumerate(plain["global_batch"][0]):
            forward_first = rank["global_batch"]["rows"][step][1]
            assert forward_first["loss/all"] == pytest.approx(
                float(loss_GS[eligible_GS].mean()), rel=2e-5
            ), "from the forward pass that chose"
        for step in range(STEPS):
            all_rows, selected_only = (
                rank["static_all_rows"]["rows"][step][1],
                rank["static"]["rows"][step][1],
            )
            unknown = {
                "loss/all",
                "loss/rejected",
                "selection/positive_excess_fraction",
                "selection/absolute_excess_nats",
            }
            assert set(all_rows) - set(selected_only) == unknown
            for metric, value in selected_only.items():
                assert value == pytest.approx(all_rows[metric], rel=2e-5, nan_ok=True), metric


@pytest.mark.parametrize("name", LAYOUTS)
def test_selected_rows_give_what_all_rows_give(name, results):
    for rank in results[name]:
        for step in range(STEPS):
            assert rank["static"]["rows"][step][0] == rank["static_all_rows"]["rows"][step][0]
            assert rank["static"]["rows"][step][2] == pytest.approx(
                rank["static_all_rows"]["rows"][step][2], rel=1e-5
            )
