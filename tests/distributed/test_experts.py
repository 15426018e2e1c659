"""Mixtures of experts in every layout against plain single-process torch: losses, selected set, gradient norm, auxiliary losses, weights;
checkpoints of one layout continued in another."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_slm.config.check import check_config
from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder, PlainTrainer
from megatron_slm.testing.spawn import run_layouts_on_cpu

STEPS, MORE_STEPS, SEQUENCES, LENGTH, VOCABULARY = 3, 2, 8, 16, 50
MICRO_BATCH = 2  # the same in every layout: experts are balanced over micro-batches
LAYOUTS = {
    "single": {},
    "dp2": dict(dp=2),
    "ep2": dict(dp=2, ep=2),
    "ep2_dp4": dict(dp=4, ep=2),
    "ep2_distributed_optimizer": dict(dp=4, ep=2, distributed_optimizer=True, overlap=True),
    "ep4": dict(dp=4, ep=4, distributed_optimizer=True),
    "tp2": dict(tp=2, sequence_parallel=True),
    "tp2_ep2": dict(tp=2, dp=2, ep=2, sequence_parallel=True),
    "tp2_ep2_whole_experts": dict(tp=2, ep=2, etp=1, sequence_parallel=True),
    "cp2_ep2": dict(cp=2, ep=2),
    "pp2": dict(pp=2),
    "ep2_pp2": dict(pp=2, dp=2, ep=2),
    "ep2_recomputed": dict(dp=2, ep=2, recompute="full"),
}
# Continued in the first layout from a checkpoint of the second, optimizer state included.
CONTINUED = {
    "ep2": "tp2",
    "tp2_ep2_whole_experts": "ep2_distributed_optimizer",
    "ep2_distributed_optimizer": "pp2",
    "ep2_pp2": "cp2_ep2",
    "single": "ep4",
    "ep4": "tp2_ep2",
}
CONTINUED_CASE = "slm_sequence"  # the one whose choice and balance depend on no layout
# case -> scorer, scope, model settings
CASES = {
    "clm": ("none", "data_parallel", dict(load_balancing_coefficient=0.1)),
    "slm": (
        "excess_loss",
        "data_parallel",
        dict(
            load_balancing_coefficient=0.1,
            router_z_loss_coefficient=0.01,
            load_balancing="sequence",
        ),
    ),
    "slm_sequence": (
        "excess_loss",
        "sequence",
        dict(load_balancing_coefficient=0.1, renormalize_experts=False),
    ),
    "slm_global": ("excess_loss", "global_batch", dict(load_balancing_coefficient=0.0)),
}
# Scorers and scopes whose divisor depends on the losses: a forward pass finds it before backward.
UNKNOWN_AHEAD = {
    "intersection": ("intersection", "sequence", {"of": ["excess_loss", "own_loss"]}),
    "soft weights": ("entropy_weight", "data_parallel", {}),
    "running threshold": ("excess_loss", "running_threshold", {}),
}


def make_config(case: str, layout: dict) -> Config:
    config = Config()
    scorer, scope, settings = CASES[case]
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=32,
        ffn_hidden_size=24,
        attention_heads=4,
        query_groups=2,
        experts=4,
        pad_vocabulary_to_multiple_of=64,
        initialization_std=0.1,
        recompute=layout.get("recompute", "none"),
        **settings,
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=MICRO_BATCH,
        train=["corpus"],
        tokenizer="t",
    )
    config.selection.scorer, config.selection.scope, config.selection.keep_fraction = (
        scorer,
        scope,
        0.6,
    )
    config.selection.reference.scores = ["synthetic"]
    config.selection.backward_rows = (
        "last_layer" if case == "slm_sequence" else "all"
    )  # exact: nothing else may change
    overlap = layout.get("overlap", False)
    config.parallel = dataclasses.replace(
        config.parallel,
        tensor=layout.get("tp", 1),
        pipeline=layout.get("pp", 1),
        context=layout.get("cp", 1),
        expert=layout.get("ep", 1),
        expert_tensor=layout.get("etp", 0),
        sequence=layout.get("sequence_parallel", False),
        distributed_optimizer=layout.get("distributed_optimizer", False),
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    return config


class SyntheticSamples:
    """Random tokens, some masked labels, some tokens without a score."""

    def __len__(self):
        return (STEPS + MORE_STEPS) * SEQUENCES

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        text = random.integers(0, VOCABULARY, LENGTH + 1)
        reference = np.round(random.uniform(3, 5, LENGTH), 1).astype(np.float32)
        reference[random.random(LENGTH) < 0.05] = np.nan
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (random.random(LENGTH) > 0.1).astype(np.float32),
            "position_ids": np.arange(LENGTH),
            "corpus_id": np.int64(0),
            "reference_loss": reference,
        }


def make_trainer(config, groups):
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.parallel import seed_everything
    from megatron_slm.training.step import Trainer
    from megatron_slm.training.token_selector import TokenSelector

    seed_everything(config.run.seed, groups)
    models = wrap_data_parallel(build_model(config, VOCABULARY, groups), config)
    return Trainer(
        models,
        build_optimizer(models, config),
        TokenSelector(config.selection, groups, sequence_length=LENGTH, corpora=1),
        groups,
    )


def steps_of(trainer, config, first: int, count: int):
    """(report, divisor before backward, divisor after it) of every step."""
    from megatron_slm.data.batch import slice_for_context_parallel
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.model import forward_backward
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.training.learning_rate import learning_rate
    from megatron_slm.training.step import train_step

    groups, sums, over_ranks = trainer.groups, [], forward_backward._over_ranks
    forward_backward._over_ranks = lambda part, groups: (
        sums.append(float(over_ranks(part, groups))),
        part,
    )[1]
    loader = TrainingLoader(
        SyntheticSamples(),
        global_batch_size=SEQUENCES,
        micro_batch_size=MICRO_BATCH,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=first * SEQUENCES,
    )
    try:
        for step in range(first, first + count):
            batches = [
                slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size)
                for batch in loader.next_step()
            ]
            sums.clear()
            report = train_step(
                trainer,
                batches,
                TrainingProgress(step, step * SEQUENCES * LENGTH),
                learning_rate(config, step + 1, config.schedule.train_steps),
            )
            yield report, sums[0], sums[-1]
    finally:
        forward_backward._over_ranks = over_ranks
        loader.close()


def next_layout(groups, layouts: list[dict]) -> dict:
    """The layout of this call; `layouts` is this process's own copy, from which those too small for its rank are dropped too."""
    while True:
        layout = layouts.pop(0)
        if groups.world_rank < layout.get("tp", 1) * layout.get("pp", 1) * layout.get(
            "cp", 1
        ) * layout.get("dp", 1):
            return layout


def train_in_layout(groups, layouts, cases, folder):
    """All cases from the start, the continued one saved at the end; or, in a layout with a "source", that one continued from the source's checkpoint."""
    layout = next_layout(groups, layouts)
    if "source" in layout:
        trainer = make_trainer(config := make_config(CONTINUED_CASE, layout), groups)
        store(groups, folder / layout["source"]).load_latest(trainer.models, trainer.optimizer)
        return observe(trainer, config, STEPS, MORE_STEPS)
    results = {case: train_case(groups, case, layout, folder) for case in cases}
    for scorer, scope, options in (
        UNKNOWN_AHEAD.values() if layout["name"] in ("dp2", "pp2") else ()
    ):
        config = make_config("slm", layout)
        config.selection.scorer, config.selection.scope, config.selection.scorer_options = (
            scorer,
            scope,
            options,
        )
        trainer = make_trainer(config, groups)
        rules = trainer.selector.rules
        assert rules.needs_whole_step(weight_needed_ahead=trainer.weight_needed_ahead)
        observe(trainer, config, 0, 2)  # which asserts that the divisor was known
    if layout["name"] in ("single", "ep2"):
        results["dense reference"] = dense_reference_losses(groups, layout)
    return results


def dense_reference_losses(groups, layout) -> list:
    """loss_BS of two sequences by a model without experts in this layout, as an online reference is built."""
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.data.batch import collate
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_losses
    from megatron_slm.training.reference import reference_config

    config = make_config("slm", layout)
    info = CheckpointInfo({**dataclasses.asdict(config.model), "experts": 0}, LENGTH, {}, 0, 0)
    config = reference_config(config, info)
    check_config(config, groups.world_size, training=False)
    batch = collate([SyntheticSamples()[index] for index in (0, 1)], [0, 1])
    return [
        output["loss"]
        for output in forward_losses(
            build_model(config, VOCABULARY, groups, trainable=False), [batch], groups
        )
    ]


def train_case(groups, case, layout, folder):
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import trainer_state

    config = make_config(case, layout)
    check_config(config, groups.world_size)
    trainer = make_trainer(config, groups)
    results = {
        "before": weights_of(trainer),
        **observe(trainer, config, 0, STEPS),
        "after": weights_of(trainer),
    }
    if case == CONTINUED_CASE and layout["name"] in CONTINUED.values():
        info = CheckpointInfo(dataclasses.asdict(config.model), LENGTH, {}, STEPS, 0)
        store(groups, folder / layout["name"]).save(
            trainer.models, trainer.optimizer, info, trainer_state(trainer.optimizer, groups)
        )
        results["rows"] += observe(trainer, config, STEPS, MORE_STEPS)[
            "rows"
        ]  # saving leaves no trace
    return results


def store(groups, folder):
    from megatron_slm.checkpoint.store import CheckpointStore

    return CheckpointStore(folder, groups)


def weights_of(trainer):
    from megatron.core.utils import unwrap_model

    return {
        name: p.detach().clone()
        for chunk in unwrap_model(trainer.models)
        for name, p in chunk.named_parameters()
    }


def observe(trainer, config, first: int, count: int):
    """Per step: selected ids of this rank, metrics, gradient norm."""
    from megatron_slm.model.router import summarise_routing
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection.diagnostics import summarise

    chosen, rows, metrics = [], [], Metrics(trainer.groups.device)
    describe = trainer.selector.describe
    trainer.selector.describe = lambda batch, outputs, selection, progress: (
        chosen.append(set(batch.token_id_BS[selection.mask].tolist())),
        describe(batch, outputs, selection, progress),
    )[1]
    for report, ahead, divisor in steps_of(trainer, config, first, count):
        assert ahead == divisor
        metrics.add_all(report.measured)
        summary = metrics.reduce(
            trainer.groups.dp_cp,
            summarise=lambda reduced: {**summarise(reduced), **summarise_routing(reduced, 2, 4)},
        )
        rows.append((set().union(*chosen), summary, report.grad_norm))
        chosen.clear()
    return {"rows": rows, "last_stage": trainer.groups.is_last_stage}


def plain_rows(case, dp, state):
    """The same steps in plain torch; populations depend on the data-parallel size under scope data_parallel."""
    from megatron_slm.training.learning_rate import learning_rate

    config = make_config(case, {})
    trainer = PlainTrainer(PlainDecoder(config.model, VOCABULARY, state), config.optimizer)
    everything, samples, rows = list(range(SEQUENCES)), SyntheticSamples(), []
    width = {"data_parallel": dp * MICRO_BATCH, "sequence": 1, "global_batch": SEQUENCES}[
        CASES[case][1]
    ]
    populations = [everything[i : i + width] for i in range(0, SEQUENCES, width)]
    micro_batches = [everything[i : i + MICRO_BATCH] for i in range(0, SEQUENCES, MICRO_BATCH)]
    for step in range(STEPS + MORE_STEPS):
        picked = [samples[step * SEQUENCES + i] for i in everything]
        batch = {
            name: torch.from_numpy(np.stack([sample[name] for sample in picked]))
            for name in picked[0]
        }
        outcome = trainer.step(
            batch,
            populations,
            None if case == "clm" else 0.6,
            learning_rate(config, step + 1, config.schedule.train_steps),
            micro_batches,
        )
        busiest = [
            chosen.flatten(0, 1).sum(0).max() / chosen.flatten(0, 1).sum(0).mean()
            for _, chosen in trainer.decoder.routed
        ]
        rows.append(
            (
                *outcome,
                float(trainer.balance) / 2,
                float(trainer.z_loss) / 2,
                float(sum(busiest)) / 2,
            )
        )
        if step + 1 == STEPS:
            after = {
                name: trainer.decoder.weight(name).detach().clone()
                for name in trainer.decoder.names
            }
    return rows, after


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    fresh = {name: {**layout, "name": name} for name, layout in LAYOUTS.items()}
    continued = {
        f"{name} from {source}": {**LAYOUTS[name], "source": source}
        for name, source in CONTINUED.items()
    }
    return run_layouts_on_cpu(
        train_in_layout,
        fresh | continued,
        list((fresh | continued).values()),
        CASES,
        tmp_path_factory.mktemp("checkpoints"),
    )


@pytest.fixture(scope="module")
def plain(results):
    return {
        (case, dp): plain_rows(case, dp, results["single"][0][case]["before"])
        for case in CASES
        for dp in (1, 2, 4)
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_plain_torch(name, case, results, plain):
    ranks = [rank[case] for rank in results[name]]
    compare(
        ranks, plain[case, LAYOUTS[name].get("dp", 1)][0][: len(ranks[0]["rows"])], CASES[case][2]
    )


def test_a_dense_reference_stands_beside_spread_experts(results):
    (expected,) = results["single"][0]["dense reference"]
    for rank in results["ep2"]:
        torch.testing.assert_close(rank["dense reference"], [expected])


@pytest.mark.parametrize("name, source", CONTINUED.items())
def test_a_checkpoint_continues_in_another_layout(name, source, results, plain):
    """The first step would show a wrong weight, the second a wrong moment or update count."""
    compare(
        results[f"{name} from {source}"],
        plain[CONTINUED_CASE, 1][0][STEPS:],
        CASES[CONTINUED_CASE][2],
    )


def compare(ranks, expected, settings):
    last_stage = [rank for rank in ranks if rank["last_stage"]]
    for step, (
        selected,
        _loss_all,
        loss_selected,
        grad_norm,
        balance,
        z_loss,
        imbalance,
    ) in enumerate(expected):
        assert set().union(*(rank["rows"][step][0] for rank in last_stage)) == selected, (
            f"step {step}: another set of tokens"
        )
        for rank in ranks:
            assert rank["rows"][step][2] == pytest.approx(grad_norm, rel=2e-4), (
                f"step {step}: another gradient norm"
            )
        for summary in (rank["rows"][step][1] for rank in last_stage):
            assert summary["loss/selected"] == pytest.approx(loss_selected, rel=2e-5)
            assert summary["moe/load_imbalance"] == pytest.approx(imbalance, rel=1e-6)
            assert ("moe/load_balancing_loss" in summary) == (
                settings["load_balancing_coefficient"] > 0
            )
            if "moe/load_balancing_loss" in summary:
                assert summary["moe/load_balancing_loss"] == pytest.approx(balance, rel=1e-5)
            if "router_z_loss_coefficient" in settings:
                assert summary["moe/router_z_loss"] == pytest.approx(z_loss, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["single", "dp2", "ep2", "ep4", "ep2_distributed_optimizer", "cp2_ep2"]
)
def test_weights_after_the_steps_equal_plain_torch(name, results, plain):
    """Experts are compared under their global number: rank r of the expert group holds experts r * 4 / ep and on."""
    size = LAYOUTS[name].get("ep", 1)
    for number, rank in enumerate(results[name]):
        first = number % size * (4 // size)
        expected = plain["slm", LAYOUTS[name].get("dp", 1)][1]
        for weight, value in rank["slm"]["after"].items():
            if ".local_experts." in weight:
                head, tail = weight.split(".local_experts.")
                local, tail = tail.split(".", 1)
                weight = f"{head}.local_experts.{first + int(local)}.{tail}"
            torch.testing.assert_close(value, expected[weight], rtol=2e-3, atol=2e-4)
