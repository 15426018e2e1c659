"""A configuration file runs no code: a scorer in a Python file is named by whoever starts the
program, on the command line.
"""

import pytest

from megatron_slm.config.code import names_code
from megatron_slm.config.load import ConfigError, load_yaml, parse_config
from megatron_slm.selection.scorers import in_file

SCORER = "scorers/mine.py:surprise"
FILES = {
    "scorer": f"selection: {{scorer: {SCORER}}}",
    "item": f"selection: {{scorer: union, scorer_options: {{of: [excess_loss, {SCORER}]}}}}",
    "key": f"selection: {{scorer: weighted_sum, scorer_options: {{of: {{{SCORER}: 1.0}}}}}}",
    "nested": f"selection: {{scorer: band, scorer_options: {{of: {{name: band, of: {SCORER}}}}}}}",
}


@pytest.fixture(params=FILES)
def recipe(request, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FILES[request.param])
    return path


def test_a_file_that_names_code_is_refused_by_what_it_names(recipe):
    with pytest.raises(ConfigError) as refusal:
        parse_config(["--config", str(recipe)], "train", "")
    [problem] = refusal.value.problems
    assert f"{recipe} names {SCORER}" in problem
    assert "command line" in problem


def test_it_may_repeat_what_the_command_line_names(recipe):
    in_file = load_yaml(recipe).selection
    command = ["--config", str(recipe), "--selection.scorer_options", f"{{of: [{SCORER}]}}"]
    assert parse_config(command, "train", "").selection.scorer == in_file.scorer


def test_the_command_line_names_it_alone(tmp_path):
    (tmp_path / "recipe.yaml").write_text("selection: {scorer: excess_loss}")
    command = ["--config", str(tmp_path / "recipe.yaml"), "--selection.scorer", SCORER]
    assert parse_config(command, "train", "").selection.scorer == SCORER


@pytest.mark.parametrize("section", ["run: {name: notes.py:x}", "selection: {scorer: none}", ""])
def test_other_text_is_no_code(section, tmp_path):
    (tmp_path / "recipe.yaml").write_text(section)
    parse_config(["--config", str(tmp_path / "recipe.yaml")], "train", "")


@pytest.mark.parametrize(
    "text", ["a.py:f", "/x/a.py:f", "a.py", "a.py:", "a.py:1", ":f", "a.txt:f", "b.py:a.py:f", ""]
)
def test_selection_and_config_agree_on_what_names_code(text):
    assert names_code(text) == in_file(text)
