"""selection.scorer: PATH.py:NAME runs the file for those who train or plan, and for nobody else."""

import hashlib
from pathlib import Path

import pytest
import torch

from megatron_slm.selection import TrainingProgress, build_scorer, scorers
from megatron_slm.selection.rules import ChoiceRules, configured_scorer
from megatron_slm.selection.scorer_files import load_scorer_files, loaded_scorer_files

SOURCE = """
from pathlib import Path
from megatron_slm.selection import register_scorer

Path(__file__).with_suffix(".ran").write_text("ran")

@register_scorer("surprise", needs=("loss", "{column}"))
def surprise(columns, progress, *, column="quality", floor_nats=0.1):
    return columns["loss"] / (columns[column] + floor_nats)
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(scorers, "SCORERS", dict(scorers.SCORERS))


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path}/mine.py:surprise"


def ran(mine: str) -> bool:
    return Path(mine.rpartition(":")[0]).with_suffix(".ran").exists()


def test_a_scorer_from_a_file_is_like_a_registered_one(mine):
    load_scorer_files(mine)
    scorer = build_scorer(mine, floor_nats=1.0)
    assert scorer.name == mine
    assert scorer.needs == {"loss", "quality"}
    columns = {"loss": torch.tensor([4.0]), "quality": torch.tensor([1.0])}
    assert scorer(columns, TrainingProgress()).item() == 2.0
    with pytest.raises(ValueError, match="unknown option floor, did you mean 'floor_nats'"):
        build_scorer(mine, floor=1.0)


def test_what_was_run_can_be_told(mine, tmp_path):
    load_scorer_files(mine)
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert f"{tmp_path}/mine.py sha256:{digest}" in loaded_scorer_files()


def test_its_own_name_is_free_for_others(mine, tmp_path):
    """Two files may each have a scorer of one name, and a file changes no registered one."""
    (tmp_path / "other.py").write_text(SOURCE.replace('["loss"] /', '["loss"] *'))
    load_scorer_files(mine)
    load_scorer_files(f"{tmp_path}/other.py:surprise")
    assert "surprise" not in scorers.SCORERS
    assert build_scorer(mine).name != build_scorer(f"{tmp_path}/other.py:surprise").name


def test_building_a_scorer_runs_no_file(mine):
    with pytest.raises(ValueError, match="code in a file, which only train and plan run"):
        build_scorer(mine)
    with pytest.raises(ValueError, match="code in a file"):
        configured_scorer("reverse", {"of": mine})
    assert not ran(mine)


@pytest.mark.parametrize(
    "name, options",
    [
        ("reverse", lambda mine: {"of": mine}),
        ("union", lambda mine: {"of": ["own_loss", {"name": mine, "floor_nats": 0.5}]}),
        ("weighted_sum", lambda mine: {"of": {mine: 1.0, "own_loss": 0.5}}),
        ("union", lambda mine: {"of": ["own_loss", {"name": "reverse", "of": {"name": mine}}]}),
    ],
)
def test_children_are_found_wherever_they_are_named(mine, name, options):
    load_scorer_files(name, options(mine))
    rules = ChoiceRules(configured_scorer(name, options(mine)), "data_parallel")
    assert rules.stored_columns == {"quality"}


def test_a_registered_name_comes_first(mine):
    scorers.SCORERS[mine] = scorers.SCORERS["own_loss"]
    load_scorer_files(mine)
    assert build_scorer(mine).needs == {"loss"}
    assert not ran(mine)


def test_other_options_are_never_taken_for_files(mine):
    load_scorer_files("excess_loss", {"column": mine})
    assert not ran(mine)


@pytest.mark.parametrize(
    "source, name, sentence",
    [
        (None, "surprise", "there is no file"),
        (SOURCE, "suprise", "registers surprise, did you mean 'surprise'"),
        ("def surprise(columns, progress):\n    pass\n", "surprise", "registers no scorer"),
        ("1 / 0", "surprise", "failed: ZeroDivisionError: division by zero"),
        (SOURCE.replace('"surprise"', '"excess_loss"'), "excess_loss", "registered already"),
        ("def broken(:", "surprise", "failed: SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, source, name, sentence):
    if source is not None:
        (tmp_path / "wrong.py").write_text(source)
    with pytest.raises(ValueError, match="wrong.py") as caught:
        load_scorer_files(f"{tmp_path}/wrong.py:{name}")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["mine.py", "mine.py:", "mine.txt:f", "excess_lss"])
def test_what_names_no_file_is_an_unknown_scorer(name):
    load_scorer_files(name)
    with pytest.raises(ValueError, match="unknown scorer .* or PATH.py:NAME"):
        build_scorer(name)


def test_only_programs_that_a_person_gives_a_configuration_load_files():
    """report, score and export read configurations that others wrote."""
    package = Path(scorers.__file__).parents[1]
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    loading = {
        path.relative_to(package).as_posix()
        for path in sources
        if "load_scorer_files(" in sources[path]
    }
    assert loading == {"selection/scorer_files.py", "training/scorer_settings.py", "plan.py"}
    asking = {path for path in sources if "import choice_rules" in sources[path]}
    asking = {path.relative_to(package).as_posix() for path in asking}
    assert {name for name in asking if not name.startswith("training/")} == {
        "plan.py",
        "pipeline/settings.py",
    }
