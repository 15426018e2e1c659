"""YAML from anybody: the same values as PyYAML's safe loader gives, or a sentence, within the size
that a person would write.
"""

import pytest
import yaml

from megatron_slm.analysis.run_folder import read_run
from megatron_slm.config.load import ConfigError, load_yaml, parse_config, to_yaml
from megatron_slm.config.schema import Config
from megatron_slm.config.yaml_text import VALUES_AT_MOST, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "{a: [1, 2.5, true, null, 'x'], b: {c: d}}",
        "base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n",  # an override, not a repetition
        "a: &x [1]\nb: *x\n",
        to_yaml(Config()),
    ],
)
def test_what_people_write_is_read_as_ever(text):
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is given twice, on lines 1 and 3"),
        ("m:\n  layers: 1\n  layers: 2\n", "m.layers is given twice, on lines 2 and 3"),
        ("l: [{x: 1, x: 1}]", r"l\[0\].x is given twice, on lines 1 and 1"),
        (BOMB, "stands for more than 100,000 values"),
        ("a: &a [*a]", r"a\[0\] contains itself"),
        ("[" * 10_000, "nested too deeply"),
        ("a: 2024-02-30", "day is out of range"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: !!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
        ("a: [", "expected the node content"),
    ],
)
def test_what_nobody_means_is_a_sentence(text, said):
    with pytest.raises(yaml.YAMLError, match=said) as refusal:
        read_yaml(text)
    assert len(str(refusal.value)) < 1000


def test_a_long_list_of_corpora_is_no_bomb():
    text = "data: {train: [" + ", ".join(f"corpus_{i}" for i in range(VALUES_AT_MOST // 2)) + "]}"
    assert len(read_yaml(text)["data"]["train"]) == VALUES_AT_MOST // 2


def test_every_reader_of_settings_uses_it(tmp_path):
    """A recipe, an option's value, and the config.yaml of a run folder that somebody sent."""
    recipe = tmp_path / "config.yaml"
    recipe.write_text("model: {layers: 1, layers: 2}")
    with pytest.raises(ConfigError, match="model.layers is given twice"):
        load_yaml(recipe)
    with pytest.raises(ConfigError, match="model.layers is given twice"):
        parse_config(["--config", str(recipe)], "train", "")
    with pytest.raises(ConfigError, match="weight is given twice"):
        parse_config(["--data.train", "[{corpus: x, weight: 1, weight: 2}]"], "train", "")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="config.yaml: .*model.layers is given twice"):
        read_run(tmp_path)


def test_a_message_never_repeats_a_value_of_any_length(tmp_path):
    recipe = tmp_path / "config.yaml"
    recipe.write_text(f"modle: [{', '.join(['x'] * 50_000)}]")
    with pytest.raises(ConfigError) as refusal:
        load_yaml(recipe)
    assert len(str(refusal.value)) < 3000
    assert "did you mean model?" in str(refusal.value)
