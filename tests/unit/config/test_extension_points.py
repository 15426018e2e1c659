"""Parts from outside the library: which names are refused, with which words, and run no code."""

import sys
from types import SimpleNamespace

import pytest

from megatron_slm.config import extension_points
from megatron_slm.config.check import check_config
from megatron_slm.config.extension_points import (
    EXTENSION_POINTS,
    load_part,
    loaded_part_files,
    named_parts,
)
from megatron_slm.config.load import ConfigError, parse_config
from megatron_slm.config.schema import Config

SINKS = next(point for point in EXTENSION_POINTS if point.setting == "monitoring.sinks")


def offer(monkeypatch, **parts) -> None:
    """Let an installed package offer parts, each name with what its entry point loads."""
    found = [
        SimpleNamespace(name=name, value=f"package:{name}", load=load)
        for name, load in parts.items()
    ]
    monkeypatch.setattr(extension_points, "entry_points", lambda group: found)


def problems_of(config: Config) -> str:
    config.data.train, config.data.tokenizer, config.schedule.train_steps = ["c"], "t", 1
    with pytest.raises(ConfigError) as refused:
        check_config(config, 1)
    [problem] = refused.value.problems
    return problem


def test_nothing_is_taken_from_outside_by_default():
    assert list(named_parts(Config())) == []


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("schedule.style", "cosin", "did you mean cosine?"),
        ("optimizer.kind", "adam", "did you mean adamw?"),
        ("monitoring.sinks", ["csv"], "expected one of: PATH.py:NAME"),
        ("monitoring.after_step", "note", "expected one of: PATH.py:NAME"),
    ],
)
def test_a_name_that_nobody_has_is_refused_by_its_setting(setting, value, advice):
    config = Config()
    section, field = setting.split(".")
    setattr(getattr(config, section), field, value)
    problem = problems_of(config)
    assert problem.startswith(f"{setting}: got ")
    assert advice in problem


def test_a_package_offers_parts_by_name(monkeypatch):
    offer(monkeypatch, csv=lambda: lambda run_folder, settings: None)
    config = Config()
    config.data.train, config.data.tokenizer, config.schedule.train_steps = ["c"], "t", 1
    config.monitoring.sinks = ["csv"]
    check_config(config, 1)
    assert callable(load_part(SINKS, "csv"))
    config.monitoring.sinks = ["cvs"]
    assert "did you mean csv?" in problems_of(config)


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch):
    def broken():
        raise ImportError("no module named pandas")

    offer(monkeypatch, csv=broken)
    with pytest.raises(
        ValueError, match=r"monitoring.sinks: csv: entry point package:csv .*pandas"
    ):
        load_part(SINKS, "csv")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def Sink(run_folder, settings): ...", ""),
        ("def sink(): ...", "defines no 'Sink'. did you mean sink?"),
        ("def Sink(run_folder): ...", r"cannot be called as Sink\(run_folder, settings\)"),
        ("Sink = 3", "is no function"),
        ("raise OSError('no disk')", "failed: OSError: no disk"),
        ("def Sink(", "failed: SyntaxError"),
    ],
)
def test_a_part_in_a_file(source, problem, tmp_path):
    path = tmp_path / "sink.py"
    path.write_text(source)
    if not problem:
        assert load_part(SINKS, f"{path}:Sink").__name__ == "Sink"
        assert any(line.startswith(f"{path} sha256:") for line in loaded_part_files())
        return
    with pytest.raises(ValueError, match=problem) as refused:
        load_part(SINKS, f"{path}:Sink")
    assert str(refused.value).startswith(f"monitoring.sinks: {path}:Sink")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_part(SINKS, f"{tmp_path}/gone.py:Sink")


def test_a_file_is_run_once(tmp_path):
    (tmp_path / "two.py").write_text(
        "runs = []\ndef a(step, metrics): ...\ndef b(step, metrics): ..."
    )
    hook = EXTENSION_POINTS[-1]
    first = load_part(hook, f"{tmp_path}/two.py:a")
    assert first.__globals__ is load_part(hook, f"{tmp_path}/two.py:b").__globals__


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {kind: mine.py:lion}",
        "schedule: {style: mine.py:lion}",
        "monitoring: {sinks: [mine.py:lion]}",
        "monitoring: {validations: [mine.py:lion]}",
        "monitoring: {after_step: mine.py:lion}",
    ],
)
def test_a_configuration_file_alone_names_no_code(text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as refused:
        parse_config(["--config", str(recipe)], "train", "")
    [problem] = refused.value.problems
    assert f"{recipe} names mine.py:lion" in problem


def test_looking_at_names_runs_nothing(tmp_path):
    path = tmp_path / "hook.py"
    path.write_text("raise SystemExit('it ran')")
    config = Config()
    config.data.train, config.data.tokenizer, config.schedule.train_steps = ["c"], "t", 1
    config.monitoring.after_step = f"{path}:hook"
    modules = set(sys.modules)
    check_config(config, 1)
    assert not {name for name in set(sys.modules) - modules if name.startswith("slm_parts_")}


def test_measurements_at_a_validation_need_a_corpus():
    config = Config()
    config.monitoring.validations = ["mine.py:measure"]
    assert problems_of(config).startswith("monitoring.validations: got ['mine.py:measure'] with no")
