"""A small description, a SLURM of stand-ins, and what finished stages leave."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_slm import submit
from megatron_slm.config.load import from_mapping
from megatron_slm.data.score_manifest import ScoreManifest
from megatron_slm.pipeline.checks import assemble
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.pipeline.state import State

MODEL = {"layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "query_groups": 2}
DESCRIPTION = {
    "folder": "out",
    "tokenizer": {"input": ["text/corpus.jsonl"], "vocabulary_size": 600},
    "corpora": {
        "corpus": {"input": ["text/corpus.jsonl"], "jobs": 2, "workers": 2},
        "curated": {"input": ["text/curated.jsonl"], "held_out_fraction": 0.5},
    },
    "training": {
        "settings": {
            "model": MODEL,
            "data": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8},
            "schedule.train_steps": 4,
        },
        "validation": {"target": "curated_held_out"},
    },
    "runs": {
        "reference": {"train": ["curated_train"]},
        "plain": {"train": ["corpus"]},
        "slm": {
            "train": ["corpus"],
            "scores": ["scores"],
            "settings": {"selection": {"scorer": "excess_loss", "keep_fraction": 0.6}},
        },
    },
    "scores": {"scores": {"reference": "reference", "corpus": "corpus", "jobs": 3}},
    "exports": {"exported": {"run": "slm", "check_on": "curated_held_out"}},
    "report": {"runs": ["plain", "slm"]},
    "slurm": {
        "sbatch": {"partition": "all"},
        "train": {"nodes": 2, "processes_per_node": 2, "sbatch": {"gpus_per_node": 2}},
    },
}
SBATCH = """#!/bin/bash
case "$*" in
    *--test-only*) [ ! -e "$SCRATCH/refuse" ] || { cat "$SCRATCH/refuse" >&2; exit 1; }; exit 0 ;;
esac
number=$(( $(cat "$SCRATCH/number" 2>/dev/null || echo 100) + 1 ))
if [ "$number" = "$(cat "$SCRATCH/fail_at" 2>/dev/null)" ]; then
    echo "slurmctld is away" >&2
    exit 1
fi
echo "$number" > "$SCRATCH/number"
settings="SLM_INPUT=$SLM_INPUT SLM_MERGE=$SLM_MERGE processes=$SLM_PROCESSES_PER_NODE"
printf '%s\\n' "$settings $*" >> "$SCRATCH/sbatch.log"
for word in "$@"; do
    case $word in
        --job-name=*) echo "$number|PENDING|Dependency|${word#--job-name=}" >> "$SCRATCH/queue" ;;
    esac
done
echo "$number"
"""
SQUEUE = '#!/bin/bash\ncat "$SCRATCH/queue" 2>/dev/null || true\n'
SCANCEL = '#!/bin/bash\necho "$1" >> "$SCRATCH/scancel.log"\n'


class Cluster:
    """A folder with text, a description in it, and stand-ins for SLURM's programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.values = json.loads(json.dumps(DESCRIPTION))
        (folder / "text").mkdir()
        for name in ("corpus", "curated"):
            (folder / "text" / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        programs = folder / "bin"
        programs.mkdir()
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    def submit(self, *words: str) -> int:
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump(self.values, sort_keys=False))
        return submit.main(["--config", str(self.folder / "pipeline.yaml"), *words])

    def submitted(self) -> list[str]:
        """Stages that sbatch was called for, in order, since the last time this was asked."""
        log = self.folder / "sbatch.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        self.lines = {line.split("--job-name=")[1].split("@")[0]: line for line in lines}
        return list(self.lines)

    def ends(self, *stages: str) -> None:
        """The jobs of these stages leave the queue, whatever came of them."""
        queue = self.folder / "queue"
        kept = [
            line
            for line in queue.read_text().splitlines()
            if line.split("|")[3].split("@")[0] not in stages
        ]
        queue.write_text("".join(f"{line}\n" for line in kept))

    def assembled(self, local: bool = False):
        description, problems = from_mapping(self.values, Pipeline)
        assert not problems
        return assemble(description, local)

    def finishes(self, *stages: str) -> None:
        """The jobs of these stages leave the queue, and everything they should make is there."""
        pipeline = self.assembled()
        state = State(pipeline)
        for stage in pipeline.stages:
            if stage.name in stages:
                leave(stage, pipeline.folder)
                state.finish(stage)
        self.ends(*stages)


def leave(stage, folder: Path) -> None:
    """What a finished stage leaves, as far as anybody asks for it."""
    output = type(stage.output).__name__
    if output in ("Files", "Manifests"):
        for path in stage.output.paths:
            path.parent.mkdir(exist_ok=True)
            path.touch()
    elif output == "CorpusParts":
        for part in range(stage.jobs):
            (folder / f"{stage.name}.shard-{part:05d}-of-{stage.jobs:05d}.manifest.json").touch()
    elif output == "Checkpoints":
        step = f"step_{stage.output.steps:08d}"
        (stage.output.run_folder / "checkpoints" / step).mkdir(parents=True)
    else:
        stage.output.folder.mkdir()
        manifest = ScoreManifest("c", 9, 1, "t", "r", "", 8, 8, "packed", 9)
        text = json.dumps(replace(manifest, complete=True).to_json())
        (stage.output.folder / "manifest.json").write_text(text)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("SLM_INPUT", "SLM_MERGE", "SLM_PROCESSES_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return Cluster(tmp_path)
