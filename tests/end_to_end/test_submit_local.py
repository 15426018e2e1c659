"""One small description run on this machine by megatron_slm.submit --local, with the real programs.

Exports and interruptions are left to tests of their own: every program that loads torch takes
seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_slm.data.score_manifest import ScoreManifest
from tests.end_to_end.small_pipeline import write_description

ROOT = Path(__file__).resolve().parents[2]


def submit(description: Path, *words: str) -> str:
    command = [sys.executable, "-m", "megatron_slm.submit", "--config", description, "--local"]
    done = subprocess.run(
        [*command, "--exports", "{}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLM_VENV": "/none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_description_becomes_trained_and_compared_models(tmp_path):
    description = write_description(tmp_path)
    out = tmp_path / "out"
    submit(description)
    assert ScoreManifest.from_json(out / "scores" / "manifest.json").complete
    records = [json.loads(line) for line in (out / "slm" / "metrics.jsonl").open()]
    assert max(record["step"] for record in records) == 4
    assert (out / "report.html").is_file()
    shown = submit(description, "--status").splitlines()
    assert {line.split()[1] for line in shown} == {"done"}
    again = submit(description)
    assert again.count("done before: ") == len(shown)
