"""Run folders are read as they are: torn, repeated, unfinished."""

import json

import numpy as np
import pytest
import yaml

from megatron_slm.analysis.run_folder import read_run, read_runs


def write_run(folder, records, config=None, **files):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def train(step, **metrics):
    return {"step": step, "kind": "train", "tokens/processed": step * 100, **metrics}


def test_series_vectors_and_messages(tmp_path):
    folder = write_run(
        tmp_path / "run",
        [
            train(20, loss=2.0, hist=[0.5, None]),
            train(10, loss=3.0),
            train(20, loss=1.5, hist=[0.25, 0.75]),
            train(30, loss=None),
            {
                "step": 20,
                "kind": "validation",
                "tokens/processed": 2000,
                "validation/curated/loss": 3.5,
                "validation/curated/tokens": 9,
            },
            {"step": 20, "kind": "something new"},
        ],
        config={
            "run": {"name": "arm"},
            "selection": {"scorer": "excess_loss"},
            "data": {"validation": [{"name": "curated", "corpus": "x"}]},
        },
        warnings__jsonl='{"text": "twice"}\n{"text": "twice"}\n{"te',
        versions__txt="torch 2\n",
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "kind": "tra')
    run = read_run(folder)
    x, y = run.series("loss")
    # Sorted by step; the later of two lines of one step counts; null is left out.
    assert x.tolist() == [1000, 2000]
    assert y.tolist() == [3.0, 1.5]
    assert run.vectors("hist")[1].tolist() == [[0.25, 0.75]]
    assert run.validation_names() == ["curated"]
    assert run.last("validation/curated/loss") == 3.5
    assert run.warnings == ["twice"]
    assert run.unreadable_lines == 1
    assert run.name == "arm"
    assert not run.is_plain
    assert run.setting("selection.reference.checkpoint", "none") == "none"


def test_selected_tokens_at_a_validation_are_interpolated(tmp_path):
    validation = [
        {
            "step": step,
            "kind": "validation",
            "tokens/processed": step * 100,
            "validation/v/loss": 1.0,
        }
        for step in (0, 15)
    ]
    records = [
        train(10, **{"tokens/selected": 600}),
        train(20, **{"tokens/selected": 1000}),
        *validation,
    ]
    slm = read_run(write_run(tmp_path / "slm", records, {"selection": {"scorer": "excess_loss"}}))
    assert slm.series("validation/v/loss", "tokens/selected")[0].tolist() == [0, 800]
    plain = read_run(write_run(tmp_path / "plain", validation, {"selection": {"scorer": "none"}}))
    assert plain.is_plain
    assert plain.series("validation/v/loss", "tokens/selected")[0].tolist() == [
        0,
        1500,
    ]
    everything = read_run(
        write_run(
            tmp_path / "all",
            validation,
            {"selection": {"scorer": "excess_loss", "keep_fraction": 1.0}},
        )
    )
    assert everything.is_plain


def test_only_metrics_are_needed(tmp_path):
    run = read_run(write_run(tmp_path / "bare", [train(1, loss=1.0)]))
    assert run.name == "bare"
    assert run.versions == ""
    assert run.token_views == []
    assert run.vectors("none")[1].shape == (0, 0)
    assert np.isnan(run.series("loss")[1]).sum() == 0


def test_same_names_become_folders(tmp_path):
    first, second = (write_run(tmp_path / name / "run", [train(1)]) for name in "ab")
    assert [run.name for run in read_runs([first, second])] == [str(first), str(second)]


def test_every_bad_folder_is_named(tmp_path):
    empty = write_run(tmp_path / "empty", [])
    bare = tmp_path / "not_a_run"
    bare.mkdir()
    with pytest.raises(ValueError) as error:
        read_runs([tmp_path / "absent", bare, empty])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "absent: no such folder" in lines[0]
    assert "holds no metrics.jsonl" in lines[1]
    assert "holds no metrics yet" in lines[2]
