"""fp16: an overflow skips the step and halves the loss scale; the scale survives a resume; the
numbers beside fp32 stand in test_layouts.py.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.config.schema import Config
from megatron_slm.testing.corpora import TOKENIZER_FINGERPRINT, random_documents, write_corpus
from megatron_slm.testing.spawn import run_layouts_on_cpu

STEPS = 8
LAYOUTS = {
    "single": {},
    "dp2": dict(dp=2),
}  # dp2 with the distributed optimizer, which has its own state


def make_config(folder: Path, layout: str, **optimizer) -> Config:
    config = Config()
    config.run.folder = str(folder)
    config.device.precision = "fp16"
    config.model = dataclasses.replace(
        config.model, layers=1, hidden_size=16, ffn_hidden_size=16, attention_heads=2
    )
    config.data = dataclasses.replace(
        config.data,
        tokenizer="none",
        train=[str(folder.parent / "corpus")],
        sequence_length=16,
        micro_batch_size=2,
        global_batch_size=4,
    )
    config.optimizer = dataclasses.replace(
        config.optimizer, loss_scale_hysteresis_steps=1, **optimizer
    )
    config.parallel.distributed_optimizer = layout == "dp2"
    config.selection.scorer = "own_loss"
    config.schedule = dataclasses.replace(config.schedule, train_steps=STEPS, warmup_fraction=0.0)
    config.checkpoint.interval_steps = 4
    config.monitoring.log_interval_steps = 1
    config.monitoring.wandb.mode = "disabled"
    return config


def start(config: Config, groups):
    from types import SimpleNamespace

    from megatron_slm.data.scored_dataset import open_corpora
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.setup import RunInputs

    Path(config.run.folder).mkdir(exist_ok=True)
    run = TrainingRun(
        config,
        groups,
        RunInputs(SimpleNamespace(piece=str), open_corpora(config.data.train), {}, 64),
    )
    run.start()
    return run


def weights(run) -> list:
    from megatron.core.utils import unwrap_model

    return [
        parameter.detach().float().clone()
        for chunk in unwrap_model(run.trainer.models)
        for parameter in chunk.parameters()
    ]


def two_scalers() -> list[list[float]]:
    """The scales of two optimizers under one, after each step of two in which only the second
    overflowed: the second overflow halves the scale.
    """
    from types import SimpleNamespace

    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    from megatron_slm.model.optimizer import update_weights

    scalers = [DynamicGradScaler(64.0, 1.0, 2.0, 0.5, 10, 2) for _ in range(2)]

    def prepare_grads() -> bool:
        for scaler, overflow in zip(scalers, (False, True), strict=True):
            scaler.update(overflow)
        return True

    optimizer = SimpleNamespace(
        param_groups=[],
        prepare_grads=prepare_grads,
        chained_optimizers=[SimpleNamespace(grad_scaler=scaler) for scaler in scalers],
    )
    scales = []
    for _ in range(2):
        updated, norm = update_weights(optimizer, 1e-3)
        assert not updated
        assert math.isnan(norm)
        scales.append([float(scaler.scale) for scaler in scalers])
    return scales


def gradients_by_head(groups, config: Config) -> dict[str, dict]:
    """Scaled gradients of sum(1e-6 * loss) by the head of every row, and by the head of selected
    rows, which makes its own in forward.
    """
    import torch
    from megatron.core.utils import get_model_config, unwrap_model

    from megatron_slm.model.build import build_model
    from megatron_slm.model.decoder import HeadChoice, head_output

    generator = torch.Generator().manual_seed(1)
    found = {}
    tokens_BS, labels_BS = torch.randint(0, 64, (2, 2, 16), generator=generator)
    weight_BS = torch.full((2, 16), 1e-6)
    scale = 2.0**20
    for rows in ("all", "selected"):
        (model,) = build_model(config, 64, groups)
        get_model_config(model).grad_scale_func = lambda loss: loss * scale
        output = model(
            tokens_BS,
            torch.arange(16).expand(2, 16),
            None,
            labels=labels_BS,
            head_choice=HeadChoice(weight_BS) if rows == "selected" else None,
        )
        head = head_output(output)
        loss_sum = (head.loss_BS * weight_BS).sum() if head.loss_sum is None else head.loss_sum
        (scale * loss_sum).backward()
        found[rows] = {
            "loss": float(loss_sum),
            **{name: p.grad.float() for name, p in unwrap_model(model).named_parameters()},
        }
    return found


def train(groups, layout: str, folder: str) -> dict:
    """Three runs: one whose first steps overflow, stopped and resumed in the middle; one that never
    fits; one that overflows at its last scale.
    """
    from megatron_slm.model.optimizer import loss_scaler_state
    from megatron_slm.training.ending import NonFiniteLoss

    here = Path(folder, layout)
    result = {}
    config = make_config(here / "whole", layout, initial_loss_scale=2.0**40)
    run = start(config, groups)
    before = weights(run)
    run.steps = 4
    run.run()
    result["unmoved"] = all(bool((a == b).all()) for a, b in zip(before, weights(run), strict=True))
    result["scale_at_4"] = loss_scaler_state(run.trainer.optimizer)
    again = start(config, groups)
    result["scale_resumed"] = loss_scaler_state(again.trainer.optimizer)
    again.run()
    config = make_config(
        here / "diverged", layout, initial_loss_scale=2.0**40, min_loss_scale=2.0**39
    )
    run = start(config, groups)
    with pytest.raises(NonFiniteLoss) as caught:
        run.run()
    return {
        **result,
        "diverged": str(caught.value),
        "diverged_step": run.step,
        "two_scalers": two_scalers(),
        "by_head": gradients_by_head(groups, config),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp16")
    for layout in LAYOUTS:
        write_corpus(
            folder / layout / "corpus",
            random_documents(40, 30, vocabulary_size=64),
            vocabulary_size=64,
            tokenizer_fingerprint=TOKENIZER_FINGERPRINT,
        )
    results = run_layouts_on_cpu(train, LAYOUTS, str(folder), side_by_side=True)
    metrics = {}
    for layout in LAYOUTS:
        lines = (folder / layout / "whole" / "metrics.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        metrics[layout] = [record for record in records if record.get("kind") == "train"]
    return results, metrics


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_skips_the_step_and_halves_the_scale(layout, runs):
    results, metrics = runs
    assert all(rank["unmoved"] for rank in results[layout]), (
        "weights moved in a step that overflowed"
    )
    assert [record["optimizer/loss_scale"] for record in metrics[layout][:4]] == [
        2.0**39,
        2.0**38,
        2.0**37,
        2.0**36,
    ]
    assert [record["optimizer/skipped_steps"] for record in metrics[layout][:4]] == [1, 2, 3, 4]
    assert not any("optimizer/grad_norm" in record for record in metrics[layout][:4])
    assert all(math.isfinite(record["loss/all"]) for record in metrics[layout])
    rates = np.array([record["optimizer/learning_rate"] for record in metrics[layout]])
    assert (np.diff(rates) < 0).all(), "the schedule goes on with the data, skipped or not"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_scale_and_the_count_survive_a_resume(layout, runs):
    results, metrics = runs
    for rank in results[layout]:
        assert (
            rank["scale_resumed"]
            == rank["scale_at_4"]
            == {
                "scale": 2.0**36,
                "growth_tracker": 0,
                "hysteresis_tracker": rank["scale_at_4"]["hysteresis_tracker"],
            }
        )
    assert metrics[layout][4]["optimizer/loss_scale"] == 2.0**35
    assert metrics[layout][4]["optimizer/skipped_steps"] == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_at_the_smallest_scale_is_divergence(layout, runs):
    for rank in runs[0][layout]:
        assert rank["diverged_step"] == 2
        assert "diverged" in rank["diverged"]


def test_dense_and_expert_weights_keep_one_scale(runs):
    """A loss is multiplied by the first optimizer's scale, so the second must divide its gradients
    by the same; overflows of either count.
    """
    assert runs[0]["single"][0]["two_scalers"] == [[64.0, 64.0], [32.0, 32.0]]


def test_small_gradients_survive_the_head_of_selected_rows(runs):
    """They are below fp16's smallest number (6e-8) until the loss scale lifts them, which must
    happen before they are stored.
    """
    by_head = runs[0]["single"][0]["by_head"]
    assert by_head["selected"]["loss"] == pytest.approx(by_head["all"]["loss"], rel=1e-6)
    for name, expected in by_head["all"].items():
        if name != "loss":
            assert (by_head["selected"][name] - expected).norm() <= 0.02 * expected.norm(), name
