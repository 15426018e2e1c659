"""The plain run that others are measured against read what they read; a report without one says
why.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_slm import report
from megatron_slm.analysis import captions
from megatron_slm.analysis.baseline import find_baseline, run_differences
from megatron_slm.analysis.run_folder import Run

SHARED = {
    "model": {"layers": 4, "recompute": "none"},
    "data": {
        "tokenizer": "data/v.model",
        "train": ["data/corpus"],
        "weights": [],
        "validation": [{"name": "target", "corpus": "data/held_out"}],
        "sequence_length": 128,
        "global_batch_size": 32,
    },
    "checkpoint": {"initialize_from": "runs/base"},
    "run": {"seed": 0},
}


def run_of(name, scorer, loss=3.5, **settings):
    """A run of two validations; settings by their dotted names with __ for the dot."""
    config = json.loads(json.dumps(SHARED | {"selection": {"scorer": scorer}}))
    for dotted, value in settings.items():
        section, key = dotted.split("__")
        config[section][key] = value
    validation = [
        {"step": step, "tokens/processed": step * 100, "validation/target/loss": value}
        for step, value in ((0, 5.0), (10, loss))
    ]
    speed = {"step": 10, "tokens/processed": 1000, "throughput/tokens_per_second": 100.0}
    return Run(name, Path(name), config, [speed], validation)


def test_a_plain_run_of_other_data_is_not_the_baseline():
    reference = run_of("reference", "none", 3.2, data__train=["data/curated"])
    slm = run_of("slm", "excess_loss", 3.4)
    baseline = find_baseline([reference, slm], "target")
    assert baseline.run is None
    assert baseline.sentence == (
        "Baseline: none. reference trains on every token, but data.train is data/corpus in slm "
        "and data/curated in reference; a baseline differs from the runs that select in the "
        "choice of tokens alone."
    )
    assert [line.tokens_to_baseline for line in captions.outcomes([reference, slm], "target")] == [
        None,
        None,
    ]
    assert "beside" not in captions.throughput([reference, slm])


def test_the_plain_arm_is_found_among_other_plain_runs():
    runs = [
        run_of("base", "none", 4.0, checkpoint__initialize_from=""),
        run_of("reference", "none", 3.0, data__train=["data/curated"]),
        run_of("plain", "none", 3.6),
        run_of("slm", "excess_loss", 3.4),
        run_of("random", "random", 3.7),
    ]
    baseline = find_baseline(runs, "target")
    assert baseline.run.name == "plain"
    assert [run.name for run in baseline.measured] == ["plain", "slm", "random"]
    assert (
        "Baseline: plain. It trains on every token, and shares data (data/corpus), tokens per "
        "step, model and start (the weights of runs/base) with slm and random." in baseline.sentence
    )
    assert (
        "base is not measured against it: checkpoint.initialize_from is not set in base and "
        "runs/base in plain" in baseline.sentence
    )
    assert (
        "reference is not measured against it: data.train is data/curated in reference"
        in baseline.sentence
    )
    outcomes = {line.run.name: line for line in captions.outcomes(runs, "target")}
    assert outcomes["slm"].tokens_to_baseline == pytest.approx(875.0)
    # The reference reached the plain run's loss too, on other text: that is no saving of tokens.
    assert outcomes["reference"].tokens_to_baseline is None
    assert not outcomes["reference"].measured
    speeds = captions.throughput(runs)
    assert speeds.count("beside plain") == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data__train", ["data/corpus", "data/more"]),
        ("data__tokenizer", "data/other.model"),
        ("data__sequence_length", 256),
        ("data__global_batch_size", 64),
        ("data__validation", [{"name": "target", "corpus": "data/other"}]),
        ("checkpoint__initialize_from", "runs/other"),
        ("model__layers", 8),
    ],
)
def test_what_a_baseline_must_share(setting, value):
    plain, slm = run_of("plain", "none", **{setting: value}), run_of("slm", "excess_loss")
    assert find_baseline([plain, slm], "target").run is None
    (difference,) = run_differences(slm, plain, "target")[:1]
    assert difference.startswith(setting.replace("__", "."))
    assert difference in find_baseline([plain, slm], "target").sentence


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data__train", ["./data/corpus"]),
        ("data__train", [str(Path("data/corpus").resolve())]),
        ("data__validation", [{"name": "another", "corpus": "data/other"}]),
        ("model__recompute", "full"),
    ],
)
def test_what_it_need_not_share(setting, value):
    plain, slm = run_of("plain", "none", **{setting: value}), run_of("slm", "excess_loss")
    assert find_baseline([plain, slm], "target").run is plain


def test_corpora_in_another_order_are_the_same_data_only_with_the_same_weights():
    plain = run_of("plain", "none", data__train=["a", "b"], data__weights=[1, 3])
    turned = run_of("slm", "excess_loss", data__train=["b", "a"], data__weights=[0.75, 0.25])
    other = run_of("slm", "excess_loss", data__train=["b", "a"], data__weights=[1, 3])
    assert run_differences(turned, plain) == []
    assert run_differences(other, plain) == [
        "data.weights is b: 1, a: 3 in slm and a: 1, b: 3 in plain"
    ]


def test_settings_that_an_older_run_does_not_tell_are_no_difference_but_data_are():
    plain, slm = run_of("plain", "none"), run_of("slm", "excess_loss")
    older = replace(plain, config={"data": {"train": ["data/corpus"]}})
    assert find_baseline([older, slm], "target").run is older
    untold = find_baseline([replace(plain, config={}), slm], "target")
    assert untold.run is None
    assert "the config.yaml of plain names no data.train" in untold.sentence


def test_random_weights_of_different_seeds_are_a_start_that_is_named():
    plain, slm = (
        run_of(name, scorer, checkpoint__initialize_from="", run__seed=seed)
        for name, scorer, seed in (("plain", "none", 1), ("slm", "excess_loss", 2))
    )
    assert "(random weights, of different seeds) with slm" in find_baseline([plain, slm]).sentence


def test_without_a_plain_run_the_report_says_how_to_get_one():
    runs = [run_of("slm", "excess_loss"), run_of("random", "random")]
    assert find_baseline(runs).sentence.startswith("Baseline: none, for every run selects tokens.")
    assert find_baseline(runs[:1]).sentence == ""


def test_page_and_terminal_say_which_run_is_the_baseline(tmp_path, capsys):
    folders = []
    for run in (run_of("reference", "none", data__train=["x"]), run_of("slm", "excess_loss")):
        folder = tmp_path / run.name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(run.config)))
        records = [record | {"kind": "validation"} for record in run.validation]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        folders.append(str(folder))
    assert report.main(["--runs", *folders, "--output", str(tmp_path / "r.html")]) == 0
    sentence = (
        "Baseline: none. reference trains on every token, but data.train is data/corpus in slm "
        "and x in reference"
    )
    assert sentence in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert sentence in page
    assert "tokens to reach" not in page
    assert "not reached" not in page


def options_of(command):
    """--name value pairs of a command line; a name followed by several values has them joined."""
    options, name = {}, ""
    for word in shlex.split(command):
        name = word if word.startswith("--") else name
        if name and word != name:
            options[name] = f"{options[name]} {word}" if name in options else word
    return options


def test_the_readme_s_report_compares_runs_that_differ_in_the_choice_of_tokens_alone():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    chain = re.search(r"## The chain.*?```bash\n(.*?)```", readme, re.DOTALL).group(1)
    commands = chain.replace("\\\n", " ").splitlines()
    trained = [options_of(line) for line in commands if " train " in line]
    by_folder = {options.pop("--run.folder"): options for options in trained}
    (shown,) = [options_of(line)["--runs"] for line in commands if "megatron_slm.report" in line]
    arms = [by_folder[folder] for folder in shown.split()]
    assert [arm["--selection.scorer"] for arm in arms] == ["none", "excess_loss"]
    plain, selecting = (
        dict(filter(lambda option: not option[0].startswith("--selection."), arm.items()))
        for arm in arms
    )
    assert plain == selecting
