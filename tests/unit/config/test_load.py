"""Defaults < file < overrides; all problems at once, each saying what to write instead."""

import dataclasses

import pytest
import yaml
from hypothesis import given, strategies

from megatron_slm.config.load import (
    ConfigError,
    from_mapping,
    load_yaml,
    parse_config,
    split_arguments,
    to_mapping,
    to_yaml,
)
from megatron_slm.config.ranges import Size, out_of_range
from megatron_slm.config.schema import Config, CorpusConfig


def read(*argv):
    return parse_config([str(word) for word in argv], "test", "a test")


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def problems_of(*argv) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    return caught.value.problems


def test_without_arguments_it_is_the_defaults():
    assert read() == Config()


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(recipe):
    path = recipe("model: {layers: 7, hidden_size: 96}\nselection: {reference: {scores: [a]}}\n")
    config = read(
        "--model.layers", 9, "--config", path, "--selection.reference.checkpoint=runs/r"
    )  # the order of options does not matter
    assert (config.model.layers, config.model.hidden_size, config.model.ffn_hidden_size) == (
        9,
        96,
        Config().model.ffn_hidden_size,
    )
    assert (config.selection.reference.scores, config.selection.reference.checkpoint) == (
        ["a"],
        "runs/r",
    )


def test_load_yaml_is_the_file_alone(recipe):
    assert load_yaml(recipe("model: {layers: 7}")).model.layers == 7
    with pytest.raises(ConfigError, match="did you mean model.layers"):
        load_yaml(recipe("model: {layer: 7}"))


@pytest.mark.parametrize(
    "text, number", [("1e-4", 1e-4), ("3E-5", 3e-5), ("1.0e-3", 1e-3), ("2", 2.0)]
)
def test_yaml_reads_numbers_with_an_exponent(recipe, text, number):
    """YAML 1.1 calls 1e-4 a text; the schema knows it is a number. In a file and as an override."""
    assert (
        read("--config", recipe(f"optimizer: {{learning_rate: {text}}}")).optimizer.learning_rate
        == number
    )
    assert read("--optimizer.learning_rate", text).optimizer.learning_rate == number


@pytest.mark.parametrize(
    "text, number",
    [
        ("1_000_000", 1_000_000),
        ("1e6", 1_000_000),
        ("15e9", 15_000_000_000),
        ("64.0", 64),
        ("15B", 15_000_000_000),
        ("1.5M", 1_500_000),
        ("4k", 4_000),
        ("2T", 2_000_000_000_000),
    ],
)
def test_whole_numbers_may_be_written_large(text, number):
    config = read("--schedule.train_tokens", text)
    assert config.schedule.train_tokens == number
    assert type(config.schedule.train_tokens) is int


@pytest.mark.parametrize(
    "text", ["1.5", "15BB", "B", "1e-3", "nan", "inf", "1e999999999", "many", "1.2345k"]
)
def test_what_is_no_whole_number_is_refused(text):
    (problem,) = problems_of("--schedule.train_tokens", text)
    assert "schedule.train_tokens" in problem
    assert "expected a whole number" in problem


@pytest.mark.parametrize("text", ["yes", "007", "2026-01-31", "name: mine", "[draft", "#1", "null"])
def test_text_on_the_command_line_is_taken_as_it_is(text):
    assert read("--run.name", text).run.name == text


def test_lists_and_mappings_on_the_command_line():
    config = read(
        "--data.train",
        "[a, b]",
        "--data.weights",
        "[0.5, 2]",
        "--selection.scorer_options",
        "{band: [0.2, 0.8]}",
        "--data.validation",
        "[{name: held_out, corpus: c}]",
        "--selection.keep_fraction",
        "{style: linear, start: 1.0, end: 0.6, tokens: 10}",
    )
    assert config.data.train == ["a", "b"]
    assert config.data.weights == [0.5, 2.0]
    assert config.selection.scorer_options == {"band": [0.2, 0.8]}
    assert config.selection.keep_fraction["end"] == 0.6
    assert config.data.validation == [CorpusConfig("held_out", "c")]
    assert read("--data.train", "alone").data.train == ["alone"]  # one corpus needs no brackets


def test_scorer_none_and_flags_without_a_value():
    assert read("--selection.scorer", "none").selection.scorer == "none"
    config = read("--parallel.sequence", "--parallel.tensor", "2")
    assert config.parallel.sequence is True
    assert config.parallel.tensor == 2


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--model.layer", 3], "did you mean model.layers?"),
        (["--modle.layers", 3], "did you mean model?"),
        (["--selection.reference.score", "[x]"], "did you mean selection.reference.scores?"),
        (["--model.banana", 3], "known here: from_checkpoint, layers, hidden_size"),
        (["--keep_fractions", 0.5], "did you mean selection.keep_fraction?"),
        (["--layers", 3], "did you mean device.layers or model.layers?"),
        (["--device.kind", "gpu"], "it can be auto, cpu, cuda"),
        (["--selection.scope", "global"], "did you mean global_batch?"),
        (
            ["--data.validation", "[{nmae: a, corpus: c}]"],
            "data.validation[0].nmae: unknown field (got 'a'); did you mean "
            "data.validation[0].name?",
        ),
    ],
)
def test_unknown_keys_name_the_nearest_one(argv, expected):
    [problem] = problems_of(*argv)
    assert expected in problem


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("model.layers", "many", "got 'many' (str); expected a whole number"),
        ("model.layers", "2.5", "got 2.5 (float); expected a whole number"),
        ("model.layers", "true", "got True (bool); expected a whole number"),
        ("optimizer.learning_rate", "fast", "expected a number"),
        ("parallel.sequence", "maybe", "expected true or false"),
        ("parallel.sequence", "1", "expected true or false"),
        (
            "selection.scope",
            "galaxy",
            "it can be sequence, micro_batch, data_parallel, global_batch, running_threshold",
        ),
        ("device.precision", "fp8", "it can be fp32, bf16"),
        ("data.train", "{a: b}", "expected a list"),
        ("data.weights", "[1, heavy]", "expected a list of numbers"),
        ("data.validation", "held_out", "expected a list of entries with name, corpus"),
        ("selection.keep_fraction", "[1]", "expected a number or a mapping"),
        ("selection.scorer_options", "3", "expected a mapping"),
        ("model", "3", "expected fields of ModelConfig, got 3"),
    ],
)
def test_wrong_types_say_what_is_expected(name, value, expected):
    [problem] = problems_of(f"--{name}", value)
    assert problem.startswith(name)
    assert expected in problem


def test_all_problems_come_at_once(recipe):
    path = recipe("model: {layers: many, hiden_size: 3}\nselection: {scope: galaxy}\n")
    problems = problems_of("--config", path, "--optimizer.beta1", "x", "stray")
    assert len(problems) == 5
    for part in (
        "model.layers",
        "model.hiden_size",
        "selection.scope",
        "optimizer.beta1",
        "'stray'",
    ):
        assert any(part in problem for problem in problems), part


def test_the_message_lists_them_all():
    with pytest.raises(ConfigError) as caught:
        read("--model.layers", "a", "--model.banana", "b")
    text = str(caught.value)
    assert text.startswith("2 problems in the configuration:\n  - ")
    assert text.count("\n  - ") == 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: [unclosed", "not readable as YAML"),
        ("- a\n- b", "expected sections"),
        ("just words", "expected sections"),
    ],
)
def test_a_file_that_is_no_configuration(recipe, text, expected):
    [problem] = problems_of("--config", recipe(text))
    assert "recipe.yaml" in problem
    assert expected in problem


def test_an_override_that_cannot_be_read():
    [problem] = problems_of("--data.train", "[a, b")
    assert "data.train" in problem


def test_a_file_that_is_not_there(tmp_path):
    [problem] = problems_of("--config", tmp_path / "nothing.yaml")
    assert "no such file" in problem
    assert "nothing.yaml" in problem


@pytest.mark.parametrize("text", ["", "model:\n", "model: {}\n"])
def test_an_empty_file_or_section_is_the_defaults(recipe, text):
    assert read("--config", recipe(text)) == Config()


@pytest.mark.parametrize("folder", ["the lab's runs/a", "long " * 60 + "name", "# x: [1]", "007"])
def test_scripts_are_told_the_run_folder_as_it_is(recipe, capsys, folder):
    """YAML would quote some of these and fold the long one."""
    with pytest.raises(SystemExit):
        read("--print_run_folder", "--run.folder", folder)
    assert capsys.readouterr().out == f"{folder}\n"


def test_print_config_is_what_the_program_would_use(recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--config", recipe("model: {layers: 7}"), "--print_config", "--run.name", "mine")
    assert stopped.value.code == 0
    printed, problems = from_mapping(yaml.safe_load(capsys.readouterr().out))
    assert not problems
    assert (printed.model.layers, printed.run.name) == (7, "mine")


def test_yaml_round_trip(tmp_path):
    config = read(
        "--run.name",
        "'Überlauf: ''x'' #1'",
        "--optimizer.learning_rate",
        "1e-4",
        "--selection.keep_fraction",
        "{style: linear, start: 1, end: 0.6, tokens: 10}",
        "--data.validation",
        "[{name: a, corpus: b}]",
        "--selection.scorer",
        "none",
        "--data.weights",
        "[1e-9]",
        "--selection.reference.checkpoint",
        "x",
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_yaml(path) == config
    assert to_mapping(load_yaml(path)) == to_mapping(config)


@pytest.mark.parametrize(
    "name",
    ["\x85", "a\x85b", "\u2028", "\u2029x", "a\nb", "\ufeff", "\x07", "\xa0", "Überlauf", ""],
)
def test_yaml_keeps_every_character(name):
    config = Config()
    config.run.name = name
    assert from_mapping(yaml.safe_load(to_yaml(config))) == (config, [])


@given(
    learning_rate=strategies.floats(1e-12, 1e3),
    name=strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=20),
    weights=strategies.lists(strategies.floats(1e-9, 1e9), max_size=4),
)
def test_yaml_round_trip_of_awkward_values(learning_rate, name, weights):
    config = Config()
    config.optimizer.learning_rate, config.run.name, config.data.weights = (
        learning_rate,
        name,
        weights,
    )
    assert from_mapping(yaml.safe_load(to_yaml(config))) == (config, [])


@pytest.mark.parametrize(
    "argv, given, problems",
    [
        (["--a.b", "1", "--flag", "--c=d=e"], {"a.b": "1", "flag": "true", "c": "d=e"}, 0),
        (["--a", "-1"], {"a": "-1"}, 0),
        (["--a="], {"a": ""}, 0),
        (["--a", "1", "--a", "2"], {"a": "2"}, 0),
        (["word", "--a", "1", "word"], {"a": "1"}, 2),
    ],
)
def test_split_arguments(argv, given, problems):
    found, wrong = split_arguments(argv)
    assert found == given
    assert len(wrong) == problems


@dataclasses.dataclass
class Entry:
    """An entry."""

    text: str = ""
    """Some text."""
    number: Size = 1
    """A number."""


@dataclasses.dataclass
class Named:
    """Entries by name."""

    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    """What they are."""


def test_entries_by_name_are_built_checked_and_overridden(recipe, capsys):
    path = recipe("entries: {a: {number: 2}, b: {}}")
    argv = ["--config", str(path), "--entries.b.text", "007"]
    settings = parse_config(argv, "test", "a test", Named)
    assert settings.entries == {"a": Entry(number=2), "b": Entry(text="007")}
    assert [name for name, _ in out_of_range(Named({"a": Entry(number=0)}))] == ["entries.a.number"]
    with pytest.raises(
        ConfigError, match="entries.a.numbr: unknown .*did you mean entries.a.number"
    ):
        parse_config(["--entries", "{a: {numbr: 2}}"], "test", "a test", Named)
    with pytest.raises(ConfigError, match="entries: got .*expected entries by name"):
        parse_config(["--entries", "[a]"], "test", "a test", Named)
    with pytest.raises(SystemExit):
        parse_config(["--help"], "test", "a test", Named)
    assert "--entries.NAME.number VALUE" in capsys.readouterr().out
