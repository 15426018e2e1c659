"""The whole pipeline by megatron_slm.submit on a real SLURM: real programs, the reference killed in the middle, resumed, done."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_slm.data.score_manifest import ScoreManifest
from tests.end_to_end.small_pipeline import write_description

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_a_pipeline_is_submitted_interrupted_resumed_and_done(cluster, tmp_path):
    description, out = write_description(tmp_path), tmp_path / "out"
    environment = {**cluster.environment, "SLM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}

    def submit(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_slm.submit", "--config", description, *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def jobs() -> dict[str, str]:
        lines = (out / "pipeline" / "jobs.jsonl").read_text().splitlines()
        return {note["stage"]: note["job"] for note in map(json.loads, lines)}

    def queued() -> str:
        command = ["squeue", "--noheader", "--format=%F %T %r %j"]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    def wait_until(condition, what: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(path.read_text()[-2000:] for path in out.glob("pipeline/logs/*"))
            assert time.monotonic() < deadline, f"{what} did not happen\n{queued()}\n{logs}"
            time.sleep(0.5)

    submit()
    stages = jobs()
    wait_until(lambda: list(out.glob("reference/checkpoints/step_*")), "a checkpoint")
    subprocess.run(["scancel", stages["reference"]], env=environment, check=True)
    wait_until(lambda: not queued().strip(), "the end of what waited for the reference")
    assert not (out / "scores").exists() and not (out / "slm").exists()
    shown = {line.split()[0]: line.split()[1] for line in submit("--status").splitlines()}
    assert (shown["corpus.merge"], shown["reference"], shown["slm"]) == (
        "done",
        "unfinished",
        "unfinished",
    )

    submit("--resume")
    again = jobs()
    assert again["corpus"] == stages["corpus"] and again["reference"] != stages["reference"]
    wait_until(lambda: not queued().strip(), "the end of the resumed pipeline")
    shown = submit("--status")
    assert {line.split()[1] for line in shown.splitlines()} == {"done"}, shown
    assert ScoreManifest.from_json(out / "scores" / "manifest.json").complete
    assert (out / "report.html").is_file()
    assert "every stage is done" in submit("--resume")
