"""Every recipe is a whole, consistent configuration; the paper's ones say what the paper says."""

from pathlib import Path

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.load import load_yaml
from megatron_slm.config.sizes import tokens_per_step, train_steps

RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
PROCESSES = {"quickstart": (2,), "llama3_8b_slm": (8, 128), "llama3_70b_slm": (64, 2048)}
"""Sizes of the job each recipe is made for; the paper's run on 32, or on one machine of 8."""


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_accepted(path):
    for processes in PROCESSES.get(path.stem, (8, 32)):
        check_config(load_yaml(path), processes)


def recipe(name: str, model: str = "tinyllama_1.1b"):
    return load_yaml(RECIPES / f"{model}_{name}.yaml")


@pytest.mark.parametrize(
    "name, tokens, learning_rate, keep_fraction",
    [
        ("math_reference", 1.5e9, 5e-5, None),
        ("math_clm", 15e9, 8e-5, None),
        ("math_slm", 15e9, 8e-5, 0.6),
        ("general_reference", 5.7e9, 5e-5, None),
        ("general_slm", 80e9, 1e-4, 0.6),
    ],
)
def test_the_papers_numbers(name, tokens, learning_rate, keep_fraction):
    config = recipe(name)
    assert config.schedule.train_tokens == tokens
    assert config.optimizer.learning_rate == learning_rate
    assert tokens_per_step(config) == 2**20
    assert config.selection.scorer == ("none" if keep_fraction is None else "excess_loss")
    assert keep_fraction is None or config.selection.keep_fraction == keep_fraction


@pytest.mark.parametrize(
    "name, tokens, learning_rate, keep_fraction",
    [("math_reference", 1.5e9, 1e-5, None), ("math_slm", 15e9, 2e-5, 0.7)],
)
def test_the_papers_numbers_for_mistral(name, tokens, learning_rate, keep_fraction):
    config = recipe(name, "mistral_7b")
    assert config.schedule.train_tokens == tokens
    assert config.optimizer.learning_rate == learning_rate
    assert config.data.sequence_length == 4096
    assert tokens_per_step(config) == 2**20
    assert keep_fraction is None or config.selection.keep_fraction == keep_fraction


@pytest.mark.parametrize("model", ("smollm2_360m", "qwen3_1.7b", "mistral_7b", "pythia_410m"))
def test_a_continual_recipe_starts_from_the_model_whose_architecture_it_has(model):
    config = recipe("math_slm", model)
    assert config.model.from_checkpoint == config.checkpoint.initialize_from
    assert tokens_per_step(config) == 2**20
    assert config.selection.scorer == "excess_loss"
    assert config.optimizer.min_learning_rate == pytest.approx(config.optimizer.learning_rate / 10)


def test_what_the_recipe_says_of_pythia_is_in_its_authors_file():
    """github.com/EleutherAI/pythia, models/410M/pythia-410m.yml."""
    config = recipe("math_slm", "pythia_410m")
    optimizer = config.optimizer
    assert config.data.sequence_length == 2048
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad_norm) == (0.1, 1.0)
    assert (config.schedule.style, config.schedule.warmup_fraction) == ("cosine", 0.01)
    assert optimizer.min_learning_rate / optimizer.learning_rate == pytest.approx(3e-5 / 3e-4)


def test_baseline_and_selective_run_differ_in_the_selection_alone():
    baseline, selective = recipe("math_clm"), recipe("math_slm")
    assert train_steps(baseline) == train_steps(selective)
    for section in ("model", "data", "optimizer", "schedule", "parallel", "device", "checkpoint"):
        assert getattr(baseline, section) == getattr(selective, section), section
    assert baseline.run.seed == selective.run.seed
    assert baseline.run.folder != selective.run.folder


def test_the_model_is_tinyllama():
    model = recipe("math_slm").model
    parameters = (
        2 * model.vocabulary_size * model.hidden_size
        + model.layers
        * model.hidden_size
        * (
            model.hidden_size * 2
            + 2 * model.query_groups * (model.hidden_size // model.attention_heads)
            + 3 * model.ffn_hidden_size
            + 2
        )
        + model.hidden_size
    )
    assert parameters == 1_100_048_384
