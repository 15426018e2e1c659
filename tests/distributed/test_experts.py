"""Mixtures of experts in every layout against plain single-process torch: losses, selected set,
gradient norm, auxiliary losses, weights; checkpoints of one layout continued in another.
"""

import contextlib
import dataclasses
import os

import pytest
import torch

from megatron_slm.config.check import check_config
from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.plain_trainer import PlainTrainer
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu
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

STEPS = 3
MORE_STEPS = 2
SEQUENCES = 8
SAMPLES = SyntheticSamples((STEPS + MORE_STEPS) * SEQUENCES)
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
if os.environ.get("SLM_LAYOUTS") == "short":  # as tests/run.sh --core asks for
    CONTINUED = {name: CONTINUED[name] for name in ("ep2_pp2", "ep4")}
    left_out = ("ep2_dp4", "tp2", "ep2_recomputed")
    LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if name not in left_out}
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
    config.selection = dataclasses.replace(
        config.selection,
        scorer=scorer,
        scope=scope,
        keep_fraction=0.6,
        # "last_layer" is exact: nothing else may change.
        backward_rows="last_layer" if case == "slm_sequence" else "all",
    )
    config.selection.reference.scores = ["synthetic"]
    overlap = layout.get("overlap", False)
    config.parallel = dataclasses.replace(
        parallel_config(layout),
        distributed_optimizer=layout.get("distributed_optimizer", False),
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    return config


@contextlib.contextmanager
def watch_divisors():
    """The divisors of the steps taken meanwhile, each summed over the ranks: of a step with experts
    the one that was known before backward, and the one counted in it.
    """
    from megatron_slm.model import forward_backward

    over_ranks = forward_backward._over_ranks
    divisors = []

    def noting(part, groups):
        divisor = over_ranks(part, groups)
        divisors.append(float(divisor))
        return divisor

    forward_backward._over_ranks = noting
    try:
        yield divisors
    finally:
        forward_backward._over_ranks = over_ranks


def observe(trainer, config, first: int, count: int) -> dict:
    """Take these steps; the divisor of each must have been known before its backward."""
    from megatron_slm.model.router import summarise_routing
    from megatron_slm.selection.diagnostics import summarise

    def summary(reduced):
        return {**summarise(reduced), **summarise_routing(reduced, 2, 4)}

    batches = local_steps(trainer.groups, config, SAMPLES, count, first)
    steps = []
    with watch_divisors() as divisors:
        for step in train(trainer, config, batches, first=first, summarise=summary):
            assert divisors[0] == divisors[-1]
            divisors.clear()
            steps.append(step)
    return {"steps": steps, "last_stage": trainer.groups.is_last_stage}


def new_trainer(groups, config):
    from megatron_slm.parallel import seed_everything

    seed_everything(config.run.seed, groups)
    return make_trainer(groups, config)


def continue_in_layout(groups, name, folder) -> dict:
    """The continued case from the checkpoint of another layout."""
    target, source = name.split(" from ")
    config = make_config(CONTINUED_CASE, LAYOUTS[target])
    trainer = new_trainer(groups, config)
    store(groups, folder / source).load_latest(trainer.models, trainer.optimizer)
    return observe(trainer, config, STEPS, MORE_STEPS)


def train_in_layout(groups, name, folder) -> dict:
    """All cases from the start, the continued one saved at the end."""
    layout = LAYOUTS[name]
    results = {case: train_case(groups, case, name, layout, folder) for case in CASES}
    if name in ("dp2", "pp2"):
        for choice in UNKNOWN_AHEAD.values():
            train_with_unknown_divisor(groups, layout, *choice)
    if name in ("single", "ep2"):
        results["dense reference"] = dense_reference_losses(groups, layout)
    return results


def train_with_unknown_divisor(groups, layout, scorer, scope, options) -> None:
    config = make_config("slm", layout)
    config.selection = dataclasses.replace(
        config.selection, scorer=scorer, scope=scope, scorer_options=options
    )
    trainer = new_trainer(groups, config)
    rules = trainer.selector.rules
    assert rules.needs_whole_step(weight_needed_ahead=trainer.weight_needed_ahead)
    observe(trainer, config, 0, 2)  # which asserts that the divisor was known


def dense_reference_losses(groups, layout) -> list:
    """loss_BS of two sequences by a model without experts in this layout, as an online reference is
    built.
    """
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.data.batch import collate
    from megatron_slm.model.build import build_model
    from megatron_slm.model.forward_backward import forward_losses
    from megatron_slm.training.reference import reference_config

    config = make_config("slm", layout)
    info = CheckpointInfo({**dataclasses.asdict(config.model), "experts": 0}, LENGTH, {}, 0, 0)
    config = reference_config(config, info)
    check_config(config, groups.world_size, training=False)
    batch = collate([SAMPLES[index] for index in (0, 1)], [0, 1])
    models = build_model(config, VOCABULARY, groups, trainable=False)
    return [output["loss"] for output in forward_losses(models, [batch], groups)]


def train_case(groups, case, name, layout, folder):
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import trainer_state

    config = make_config(case, layout)
    check_config(config, groups.world_size)
    trainer = new_trainer(groups, config)
    results = {
        "before": weights_of(trainer),
        **observe(trainer, config, 0, STEPS),
        "after": weights_of(trainer),
    }
    if case == CONTINUED_CASE and name in CONTINUED.values():
        info = CheckpointInfo(dataclasses.asdict(config.model), LENGTH, {}, STEPS, 0)
        store(groups, folder / name).save(
            trainer.models, trainer.optimizer, info, trainer_state(trainer.optimizer, groups)
        )
        # Saving leaves no trace: the steps after it are compared too.
        results["steps"] += observe(trainer, config, STEPS, MORE_STEPS)["steps"]
    return results


def store(groups, folder):
    from megatron_slm.checkpoint.store import CheckpointStore

    return CheckpointStore(folder, groups)


def plain_rows(case, dp, state):
    """The same steps in plain torch, and the weights after the first STEPS; populations depend on
    the data-parallel size under scope data_parallel.
    """
    from megatron_slm.training.learning_rate import learning_rate

    config = make_config(case, {})
    rows = []
    after = {}
    trainer = PlainTrainer(PlainDecoder(config.model, VOCABULARY, state), config.optimizer)
    for step in range(STEPS + MORE_STEPS):
        outcome = trainer.step(
            whole_batch(SAMPLES, range(step * SEQUENCES, (step + 1) * SEQUENCES)),
            rows_in_populations(config.selection.scope, SEQUENCES, dp * MICRO_BATCH),
            None if case == "clm" else config.selection.keep_fraction,
            learning_rate(config, step + 1, config.schedule.train_steps),
            rows_in_populations("", SEQUENCES, MICRO_BATCH),
        )
        load_of_layers = [chosen.flatten(0, 1).sum(0) for _, chosen in trainer.decoder.routed]
        imbalance = sum(load.max() / load.mean() for load in load_of_layers)
        routing = (trainer.balance, trainer.z_loss, imbalance)
        rows.append((*outcome, *(float(value) / 2 for value in routing)))
        if step + 1 == STEPS:
            for name in trainer.decoder.names:
                after[name] = trainer.decoder.weight(name).detach().clone()
    return rows, after


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    trained = run_layouts_on_cpu(train_in_layout, LAYOUTS, folder, side_by_side=True)
    pairs = {f"{name} from {source}": LAYOUTS[name] for name, source in CONTINUED.items()}
    return trained | run_layouts_on_cpu(continue_in_layout, pairs, folder, side_by_side=True)


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
    rows, _ = plain[case, LAYOUTS[name].get("dp", 1)]
    compare(ranks, rows[: len(ranks[0]["steps"])], CASES[case][2])


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
    for step, row in enumerate(expected):
        selected, _loss_all, loss_selected, grad_norm, *routing = row
        last_stage = assert_same_step(ranks, step, selected, grad_norm)
        for found in last_stage:
            assert found.summary["loss/selected"] == pytest.approx(loss_selected, rel=2e-5)
            compare_routing(found.summary, *routing, settings)


def compare_routing(summary, balance, z_loss, imbalance, settings):
    assert summary["moe/load_imbalance"] == pytest.approx(imbalance, rel=1e-6)
    balanced = settings["load_balancing_coefficient"] > 0
    assert ("moe/load_balancing_loss" in summary) == balanced
    if balanced:
        assert summary["moe/load_balancing_loss"] == pytest.approx(balance, rel=1e-5)
    if "router_z_loss_coefficient" in settings:
        assert summary["moe/router_z_loss"] == pytest.approx(z_loss, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["single", "dp2", "ep2", "ep4", "ep2_distributed_optimizer", "cp2_ep2"]
)
def test_weights_after_the_steps_equal_plain_torch(name, results, plain):
    """Experts are compared under their global number: rank r of the expert group holds experts
    r * 4 / ep and on.
    """
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
