"""The plan counts the forward passes and the backward work that training does, for every scorer in
every scope.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_slm.config.schema import Config, ModelConfig, ReferenceConfig, SelectionConfig
from megatron_slm.data.batch import Batch
from megatron_slm.planning.communication import traffic
from megatron_slm.planning.hardware import find_gpu
from megatron_slm.planning.job import Job
from megatron_slm.planning.work import work
from megatron_slm.selection import SCORERS, TrainingProgress
from megatron_slm.selection.populations import SCOPES
from megatron_slm.selection.rules import MODEL_COLUMNS
from megatron_slm.training import step_choices
from megatron_slm.training.token_selector import TokenSelector

OPTIONS = {
    "stored_score": {"column": "quality"},
    "stored_mask": {"column": "quality"},
    "stored_weight": {"column": "quality"},
    "weighted_sum": {"of": {"own_loss": 1.0, "own_entropy": 0.5}},
}
ONE_RANK = SimpleNamespace(dp_cp=None, cp=None, is_last_stage=True, device=torch.device("cpu"))
B, S = 4, 64
START = TrainingProgress(0, 0)


def settings_of(scorer: str, scope: str, **changes) -> SelectionConfig:
    reference = ReferenceConfig(scores=["scores"])
    options = OPTIONS.get(scorer, {})
    return SelectionConfig(
        scorer=scorer, scorer_options=options, scope=scope, reference=reference, **changes
    )


def job_of(settings: SelectionConfig, experts: int) -> Job:
    model = ModelConfig(experts=experts, vocabulary_size=1000)
    return Job(Config(model=model, selection=settings), 1000, find_gpu("H100"))


def batch_of(generator: torch.Generator) -> Batch:
    names = ["reference_loss", "reference_entropy", "quality", "prior_loss", "conditional_loss"]
    names += ["base_loss", "history_loss", "short_context_loss"]
    tokens_BS = torch.zeros(B, S, dtype=torch.int64)
    token_id_BS = torch.arange(B * S).view(B, S)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        loss_mask_BS=torch.ones(B, S),
        position_ids_BS=token_id_BS % S,
        token_id_BS=token_id_BS,
        corpus_id_B=torch.zeros(B, dtype=torch.int64),
        columns={name: torch.rand(B, S, generator=generator) * 3 for name in names},
    )


def forward_passes_of_training(monkeypatch, settings, weight_needed_ahead: bool) -> int:
    """How often a step's choice runs the model before its first backward."""
    ran = []

    def forward_losses(models, batches, groups, extras):
        ran.append(extras)
        values = torch.rand(B, S, generator=torch.Generator().manual_seed(1))
        return [{"loss": values, **dict.fromkeys(extras, values)} for _ in batches]

    monkeypatch.setattr(step_choices, "forward_losses", forward_losses)
    selector = TokenSelector(settings, ONE_RANK, sequence_length=S, corpora=1)
    trainer = SimpleNamespace(
        selector=selector, models=[], groups=ONE_RANK, weight_needed_ahead=weight_needed_ahead
    )
    batch = batch_of(torch.Generator().manual_seed(0))
    step_choices.select_before_backward(trainer, [batch], START)
    return len(ran)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_a_forward_pass_is_charged_where_training_runs_one(scorer, scope, monkeypatch):
    settings = settings_of(scorer, scope)
    for experts in (0, 4):
        job = job_of(settings, experts)
        try:
            runs = forward_passes_of_training(monkeypatch, settings, bool(experts))
        except ValueError:  # train refuses this scorer in this scope, and so does plan's check
            with pytest.raises(ValueError):
                job.rules.check()
            continue
        assert job.scores_before_backward == (runs > 0)
        assert (work(job).choosing > 0) == (runs > 0)


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_share_that_is_trained_on_is_never_more_than_planned(scorer):
    settings = settings_of(scorer, "micro_batch", keep_fraction=0.3)
    planned = job_of(settings, 0).trained_fraction
    selector = TokenSelector(settings, ONE_RANK, sequence_length=S, corpora=1)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(B, S, generator=generator) for name in MODEL_COLUMNS}
    kept = selector.choose(batch_of(generator), values, START).weights.count_nonzero().item()
    whole_sequence = S if scorer == "rho_loss" else 0  # the last sequence is completed
    assert kept <= math.ceil(planned * B * S - 1e-9) + whole_sequence
    if selector.scorer.kind == "score":
        assert planned == 0.3


@pytest.mark.parametrize(
    "scorer, options, planned",
    [
        ("none", {}, 1.0),
        ("random", {}, 0.3),
        ("stored_weight", {"column": "quality"}, 1.0),
        ("entropy_weight", {}, 1.0),
        ("band", {}, 0.3),
        ("intersection", {}, 0.3),
        ("union", {}, 0.6),
        ("union", {"of": [{"name": "random", "keep_fraction": 0.9}, "reference_loss"]}, 1.0),
        ("intersection", {"of": [{"name": "random", "keep_fraction": 0.1}, "random"]}, 0.1),
    ],
)
def test_keep_fraction_counts_where_it_decides(scorer, options, planned):
    settings = replace(
        settings_of(scorer, "micro_batch", keep_fraction=0.3), scorer_options=options
    )
    assert job_of(settings, 0).trained_fraction == pytest.approx(planned)


@pytest.mark.parametrize(
    "clm_weight, planned",
    [
        (0.0, 0.3),
        (0.2, 1.0),
        ({"style": "linear", "start": 0.5, "end": 0.0, "tokens": 10}, 0.3),
        ({"style": "linear", "start": 0.0, "end": 0.5, "tokens": 10}, 1.0),
    ],
)
def test_plain_loss_mixed_in_trains_every_token_while_it_has_a_weight(clm_weight, planned):
    settings = settings_of("excess_loss", "micro_batch", keep_fraction=0.3, clm_weight=clm_weight)
    assert job_of(settings, 0).trained_fraction == planned


@pytest.mark.parametrize(
    "scorer, searches", [("excess_loss", 1), ("intersection", 2), ("none", 0), ("stored_mask", 0)]
)
def test_a_choice_of_several_sends_its_scores_several_times(scorer, searches):
    job = job_of(settings_of(scorer, "data_parallel"), 0)
    job = replace(job, config=replace(job.config, data=replace(job.config.data)))
    job.config.data.micro_batch_size, job.config.data.global_batch_size = 1, 8
    one = 4 * job.rank_tokens * (job.ranks - 1) * job.micro_batches
    sent = sum(each.sent_bytes for each in traffic(job, 0) if each.role == "selection")
    assert sent == searches * one


def test_auxiliary_losses_are_known_from_the_configuration():
    from megatron_slm.config.architecture import has_auxiliary_losses
    from megatron_slm.model import router
    from megatron_slm.model.transformer_config import transformer_config

    for changes in (
        {},
        {"experts": 4},
        {"experts": 4, "load_balancing_coefficient": 0.0, "router_z_loss_coefficient": 0.0},
        {"experts": 4, "load_balancing_coefficient": 0.0, "router_z_loss_coefficient": 0.1},
    ):
        model = ModelConfig(**changes)
        built = SimpleNamespace(config=transformer_config(Config(model=model), on_gpu=False))
        assert has_auxiliary_losses(model) == router.has_auxiliary_losses([built])
