"""The descriptions in launch/pipelines are refused for nothing but files that are not here."""

from pathlib import Path

import pytest
import yaml

from megatron_slm.config.load import from_mapping
from megatron_slm.pipeline.checks import assemble
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.training.setup import RunInputError

ROOT = Path(__file__).parents[3]


def description_of(name: str) -> Pipeline:
    values = yaml.safe_load((ROOT / "launch" / "pipelines" / name).read_text())
    description, problems = from_mapping(values, Pipeline)
    assert problems == []
    return description


@pytest.mark.parametrize("local", (True, False))
def test_the_quickstart_needs_nothing(monkeypatch, local):
    monkeypatch.chdir(ROOT)
    pipeline = assemble(description_of("quickstart.yaml"), local)
    trained = [stage.name for stage in pipeline.stages if stage.kind == "train"]
    assert trained == ["base", "reference", "plain", "slm", "random"]


def test_the_paper_s_recipe_needs_its_text_and_its_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RunInputError) as refused:
        assemble(description_of("rho1_math.yaml"), local=False)
    places = {problem.split(":")[0] for problem in refused.value.problems}
    assert places == {
        "tokenizer.path",
        "corpora.open_web_math.input",
        "corpora.curated.input",
        "imports.tinyllama_base.input",
    }
