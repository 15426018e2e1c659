"""The whole pipeline by megatron_slm.submit on a real SLURM: a stage cancelled, resumed, done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.data.score_manifest import ScoreManifest
from tests.end_to_end.small_pipeline import write_description
from tests.slurm.cluster import ROOT, Cluster, wait_until

pytestmark = pytest.mark.slow


class Submitted:
    """One pipeline on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster = cluster
        self.out = folder / "out"
        # Long enough to be cancelled between its first checkpoint and its last.
        self.description = write_description(folder, reference_steps=100)

    def submit(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_slm.submit", "--config", self.description, *words],
            cwd=ROOT,
            env={**self.cluster.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, str]:
        return {line.split()[0]: line.split()[1] for line in self.submit("--status").splitlines()}

    def jobs(self) -> dict[str, str]:
        lines = (self.out / "pipeline" / "jobs.jsonl").read_text().splitlines()
        return {note["stage"]: note["job"] for note in map(json.loads, lines)}

    def queued(self) -> list[str]:
        lines = self.cluster.call("squeue", "--noheader", "--format=%F %T %r %j").stdout
        return [line for line in lines.splitlines() if "@" in line]

    def wait_for(self, condition, what: str) -> None:
        def message() -> str:
            logs = sorted(self.out.glob("pipeline/logs/*"))
            tails = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs]
            return "\n".join([f"{what} did not happen", *self.queued(), *tails])

        wait_until(condition, 600, message)


def test_a_pipeline_is_submitted_interrupted_resumed_and_done(cluster, tmp_path):
    pipeline = Submitted(cluster, tmp_path)
    out = pipeline.out
    pipeline.submit()
    first = pipeline.jobs()
    pipeline.wait_for(lambda: list(out.glob("reference/checkpoints/step_*")), "a checkpoint")
    cluster.call("scancel", first["reference"])
    pipeline.wait_for(lambda: not pipeline.queued(), "the end of what waited for the reference")
    assert not (out / "scores").exists()
    assert not (out / "slm").exists()
    shown = pipeline.status()
    assert shown["corpus.merge"] == "done"
    assert shown["reference"] == "unfinished"
    assert shown["slm"] == "unfinished"

    pipeline.submit("--resume")
    again = pipeline.jobs()
    assert again["corpus"] == first["corpus"]
    assert again["reference"] != first["reference"]
    pipeline.wait_for(lambda: not pipeline.queued(), "the end of the resumed pipeline")
    assert set(pipeline.status().values()) == {"done"}
    assert ScoreManifest.from_json(out / "scores" / "manifest.json").complete
    assert (out / "report.html").is_file()
    assert "every stage is done" in pipeline.submit("--resume")
