"""The planner knows the checkpoint a run starts from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_slm.checkpoint.folder import describe_model
from megatron_slm.config.load import load_yaml
from megatron_slm.plan import main

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tinyllama_1.1b_math_reference.yaml"


@pytest.fixture
def base(tmp_path) -> str:
    """The recipe's own model, with half of its layers."""
    model = replace(load_yaml(RECIPE).model, layers=11)
    step = tmp_path / "base" / "checkpoints" / "step_00000000"
    step.mkdir(parents=True)
    described = {
        "model": describe_model(model, model.vocabulary_size),
        "sequence_length": 2048,
        "tokenizer": {},
        "step": 0,
        "tokens_processed": 0,
    }
    (step / "model.json").write_text(json.dumps(described))
    (step / "checksums.json").write_text("{}")
    return str(tmp_path / "base")


def plan(*settings: str) -> int:
    return main(["--config", str(RECIPE), "--nodes", "4", "--json", "--proposals", "0", *settings])


def test_a_start_that_train_would_refuse_is_said(base, capsys):
    assert plan("--checkpoint.initialize_from", base) == 0
    said = capsys.readouterr().err
    assert "train would refuse this: checkpoint.initialize_from" in said
    assert "has model.layers 11, this configuration 22" in said


def test_a_start_from_elsewhere_is_none_of_its_business(capsys):
    assert plan("--checkpoint.initialize_from", "runs/on_the_cluster") == 0
    assert capsys.readouterr().err == ""


def test_the_planned_model_is_the_checkpoints(base, tmp_path, capsys):
    settings = yaml.safe_load(RECIPE.read_text()) | {"model": {"from_checkpoint": base}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["--config", str(recipe), "--nodes", "4", "--json", "--proposals", "0"]) == 0
    half = json.loads(capsys.readouterr().out)["parameters"]["total"]
    assert plan("--model.layers", "11") == 0
    assert half == json.loads(capsys.readouterr().out)["parameters"]["total"]
    assert plan("--model.from_checkpoint", base) == 2
    assert "model.layers: got 22, but model.from_checkpoint" in capsys.readouterr().err
