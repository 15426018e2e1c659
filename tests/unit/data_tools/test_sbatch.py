"""The array job script, run as SLURM would run its tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from data_tools.preprocess import main

ROOT = Path(__file__).resolve().parents[3]


def launch(**variables) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLM_", "SLURM_"))
    }
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "preprocess.sbatch")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **environment,
            "SLM_PYTHON": sys.executable,
            **{name: str(value) for name, value in variables.items()},
        },
    )


def test_array_and_merge(tmp_path, vocabulary):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": f"file {number} line {n}"}) + "\n" for n in range(50))
        )
    variables = {
        "SLM_INPUT": f"{tmp_path}/*.jsonl",
        "SLM_TOKENIZER": vocabulary,
        "SLM_OUTPUT": tmp_path / "c",
    }
    for index in (1, 2, 1):  # array ids from 1; a task that is run again changes nothing
        done = launch(
            **variables, SLURM_ARRAY_TASK_ID=index, SLURM_ARRAY_TASK_MIN=1, SLURM_ARRAY_TASK_COUNT=2
        )
        assert done.returncode == 0, done.stderr
    done = launch(**variables, SLM_MERGE=1, SLM_SHARDS=2)
    assert done.returncode == 0, done.stderr
    assert (
        main(
            [
                "--input",
                f"{tmp_path}/*.jsonl",
                "--tokenizer",
                str(vocabulary),
                "--output-prefix",
                str(tmp_path / "whole"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    for suffix in (".bin", ".idx"):
        assert (
            Path(f"{tmp_path}/c{suffix}").read_bytes()
            == Path(f"{tmp_path}/whole{suffix}").read_bytes()
        )


def test_what_is_missing_is_said():
    assert "SLM_INPUT is not set" in launch().stderr
    done = launch(SLM_INPUT="a", SLM_TOKENIZER="b", SLM_OUTPUT="c")
    assert done.returncode != 0 and "--array" in done.stderr
