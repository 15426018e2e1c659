"""One description run on this machine by megatron_slm.submit --local: stopped in the middle, continued, and done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_slm.data.score_manifest import ScoreManifest
from tests.end_to_end.small_pipeline import write_description

ROOT = Path(__file__).resolve().parents[2]


def start(description: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_slm.submit", "--config", description, "--local", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLM_VENV": "/none"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_a_description_is_stopped_continued_and_done(tmp_path):
    description, out = write_description(tmp_path), tmp_path / "out"
    process = start(description)
    deadline = time.monotonic() + 300
    while not list(out.glob("reference/checkpoints/step_*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 85, said
    assert "the same command continues from here" in said
    assert not (out / "scores").exists()

    process = start(description)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "done before: corpus" in said
    assert ScoreManifest.from_json(out / "scores" / "manifest.json").complete
    steps = [json.loads(line)["step"] for line in open(out / "slm" / "metrics.jsonl")]
    assert max(steps) == 4
    assert (out / "exported" / "config.json").is_file() and (out / "report.html").is_file()

    process = start(description, "--status")
    said, _ = process.communicate(timeout=60)
    assert {line.split()[1] for line in said.splitlines()} == {"done"}, said
