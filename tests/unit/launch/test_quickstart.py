"""launch/quickstart.sh with a stand-in for every program: which stages run, again or not, on whose
text, and what is moved aside.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_slm.data.score_manifest import ScoreManifest

ROOT = Path(__file__).parents[3]
# Plays every program: notes its words, and makes what they say it writes. A text that says "bad"
# fails its reader.
PYTHON = r"""#!/bin/bash
case "$*" in
    "-m megatron_slm.submit"*) exec "$REAL_PYTHON" "$@" ;;
    -c* | *programs.py* | "-m pip "*) exit 0 ;;
    *--check_only*) echo unused; exit 0 ;;
esac
printf '%s\n' "$*" >> "$SCRATCH/programs.log"
program=$2
[ "$program" != --standalone ] || program=$6
while [ $# -gt 0 ]; do
    case $1 in
        --input) input=$2 ;;
        --config) config=$2 ;;
        --output-prefix | --output | --output-folder) output=$2 ;;
    esac
    shift
done
if [ -n "${input:-}" ] && grep -q bad "$input"; then mkdir -p "$output.partial"; exit 3; fi
value() { sed -n "s/^ *$1: //p" "$config" | head -n 1; }
setting() {
    "$REAL_PYTHON" -c "import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))$1)" "$config"
}
case $program in
    tokenizer.train | data_tools.preprocess)
        touch "$output.model" "$output.bin" "$output.manifest.json" ;;
    data_tools.split) touch "${output}"_{train,held_out}.{bin,manifest.json} ;;
    megatron_slm.report) touch "$output" ;;
    megatron_slm.check_export | data_tools.verify) ;;
    megatron_slm.export_hf) mkdir -p "$output"; touch "$output/config.json" ;;
    megatron_slm.train)
        folder=$(setting '["run"]["folder"]') || exit 1
        mkdir -p "$folder/checkpoints/step_$(printf %08d "$(value train_steps)")" ;;
    megatron_slm.score)
        folder=$(setting '["output"]') || exit 1
        mkdir -p "$folder"; cp "$SCRATCH/scores.json" "$folder/manifest.json" ;;
    *)
        mkdir -p "$output"
        for name in corpus curated held_out; do echo "$output" > "$output/$name.jsonl"; done ;;
esac
"""
ARMS = ["base", "reference", "plain", "slm", "random"]


class Checkout:
    def __init__(self, folder: Path):
        self.folder = folder
        self.here = folder / "the lab's texts"
        self.here.mkdir()
        shutil.copytree(ROOT / "launch", folder / "launch")
        for name in ("requirements.txt", "pyproject.toml"):  # what launch/venv.sh looks at
            (folder / name).touch()
        environment = folder / "venv" / "bin"
        environment.mkdir(parents=True)
        (environment / "python").write_text(PYTHON)
        (environment / "python").chmod(0o755)
        scores = ScoreManifest("c", 9, 1, "t", "r", "", 8, 8, "packed", 9, complete=True)
        (folder / "scores.json").write_text(json.dumps(scores.to_json()))

    def write(self, corpus: str, curated: str) -> None:
        (self.here / "corpus.jsonl").write_text(corpus)
        (self.here / "curated.jsonl").write_text(curated)

    def run(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit code, output, and the programs that ran, in order; called from the folder of the
        texts.
        """
        log = self.folder / "programs.log"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", self.folder / "launch" / "quickstart.sh", *arguments],
            cwd=self.here,
            env={
                "PATH": os.environ["PATH"],
                "VIRTUAL_ENV": str(self.folder / "venv"),
                "SLM_VENV": "/nonexistent",
                "SLM_PYTHON": str(self.folder / "venv" / "bin" / "python"),
                "REAL_PYTHON": sys.executable,
                "PYTHONPATH": str(ROOT),
                "SCRATCH": str(self.folder),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        return done.returncode, done.stdout, [named(line) for line in lines]

    def own_text(self) -> tuple[int, str, list[str]]:
        return self.run("--corpus", "corpus.jsonl", "--curated", "curated.jsonl", "--folder", "out")

    def log(self) -> str:
        return (self.folder / "programs.log").read_text()


def named(line: str) -> str:
    """The program of a line of the log, with the run folder's name where it trains."""
    words = line.split()
    module = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name
    if module == "megatron_slm.train":
        return Path(line.split("--config ")[1]).stem
    return module


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def test_a_second_call_keeps_every_stage(checkout):
    code, output, programs = checkout.run("--quick")
    assert code == 0, output
    assert programs[:2] == ["stdlib_corpus.py", "tokenizer.train"]
    assert [name for name in programs if name in ARMS] == ARMS
    code, output, programs = checkout.run("--quick")
    assert (code, programs) == (0, []), output
    assert "done before: slm" in output
    assert not list(checkout.folder.glob("runs/*/earlier_*"))


def test_own_text_in_the_folder_of_an_earlier_quickstart_is_what_the_report_shows(checkout):
    checkout.run("--quick", "--folder", "out")
    checkout.write("my text", "good text")
    code, output, programs = checkout.run(
        "--quick", "--folder", "out", "--corpus", "corpus.jsonl", "--curated", "curated.jsonl"
    )
    assert code == 0, output
    assert [name for name in programs if name in ARMS] == ARMS
    assert "done before" not in output
    assert "slm: its inputs or options have changed, so it is made again" in output
    out = checkout.here / "out"
    kept = {path.name for path in (out / "earlier_1").iterdir()}
    assert {"tokenizer.model", "corpus.bin", "curated.bin", "slm", "scores"} <= kept
    assert {"huggingface", "report.html"} <= kept


def test_a_changed_text_redoes_what_depends_on_it_and_nothing_else(checkout):
    checkout.write("my text", "good text")
    assert checkout.own_text()[0] == 0
    checkout.write("my text", "better text")
    code, output, programs = checkout.own_text()
    assert code == 0, output
    assert "done before: tokenizer" in output
    assert "done before: corpus" in output
    assert [name for name in programs if name.startswith("data_tools")] == [
        "data_tools.preprocess",
        "data_tools.split",
    ]
    assert {"reference", "megatron_slm.score", "slm"} <= set(programs)


def test_after_a_bad_text_the_good_one_works(checkout):
    checkout.write("my text", "bad text")
    code, output, _ = checkout.own_text()
    assert (code, "the same command continues from here" in output) == (3, True), output
    checkout.write("my text", "good text")
    code, output, _ = checkout.own_text()
    assert code == 0, output
    assert (checkout.here / "out" / "earlier_1" / "curated.partial").exists()


def test_what_no_stage_is_known_to_have_made_is_moved_aside(checkout):
    """The folder of a quickstart from before its stages remembered what they were made from."""
    checkout.run("--quick", "--folder", "out")
    out = checkout.here / "out"
    (out / "pipeline" / "stages" / "slm").unlink()
    code, output, programs = checkout.run("--quick", "--folder", "out")
    assert code == 0, output
    assert "slm: nothing says what it was made from, so it is made again" in output
    assert programs == ["slm"]
    assert (out / "earlier_1" / "slm").is_dir()


def test_paths_are_seen_from_where_the_caller_stands(checkout):
    checkout.write("my text", "good text")
    code, output, _ = checkout.own_text()
    assert code == 0, output
    assert f"--input {checkout.here}/corpus.jsonl " in checkout.log()
    assert (checkout.here / "out" / "slm").is_dir()
    config = checkout.here / "out" / "pipeline" / "configs" / "slm.yaml"
    train = yaml.safe_load(config.read_text())["data"]["train"]
    assert train == [f"{checkout.here}/out/corpus"]


def test_a_missing_text_is_named_before_anything_starts(checkout):
    checkout.write("my text", "good text")
    code, output, programs = checkout.run("--corpus", "corpus.jsonl", "--curated", "nowhere.jsonl")
    assert (code, programs) == (2, []), output
    assert f"{checkout.here}/nowhere.jsonl: no such file" in output
