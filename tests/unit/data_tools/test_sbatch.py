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
            "SLM_VENV": "/nonexistent",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
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
    assert done.returncode != 0
    assert "--array" in done.stderr


def test_cluster_settings_and_their_container_are_used(tmp_path):
    start = tmp_path / "container"
    start.write_text('#!/bin/bash\nprintf "%s\\n" "$OMP_NUM_THREADS $*"\n')
    start.chmod(0o755)
    settings = tmp_path / "env.sh"
    settings.write_text(
        f'SLM_CONTAINER=({start} exec image.sif)\nsource "$SLM_ROOT/launch/env.sh"\n'
    )
    corpus = {"SLM_INPUT": "/data/*.jsonl /more", "SLM_TOKENIZER": "t.model", "SLM_OUTPUT": "c"}
    array = {"SLURM_ARRAY_TASK_ID": 3, "SLURM_ARRAY_TASK_COUNT": 4, "SLURM_CPUS_PER_TASK": 2}
    done = launch(SLM_ENV=settings, **corpus, **array)
    assert done.stdout == (
        "1 exec image.sif python -m data_tools.preprocess --input /data/*.jsonl /more "
        "--tokenizer t.model --output-prefix c --shard 3/4 --workers 2\n"
    )
    merged = launch(SLM_ENV=settings, SLM_MERGE=1, SLM_SHARDS=4, **corpus)
    assert "exec image.sif python -m data_tools.merge --output-prefix c" in merged.stdout
