"""Kill a run with SIGKILL again and again: its metrics.jsonl continues with the losses of an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14
NOT_COMPARED = ("throughput/",)     # times differ; everything else is compared


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus of random text with a tokenizer and made-up scores."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(random.choice(words, 200))}) + "\n" for _ in range(80)))
    run = [sys.executable, "-m"]
    subprocess.run([*run, "tokenizer.train", "--input", folder / "text.jsonl", "--output-prefix", folder / "tok", "--vocab-size", "300"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*run, "data_tools.preprocess", "--input", folder / "text.jsonl", "--tokenizer", folder / "tok.model", "--output-prefix", folder / "text", "--workers", "1"],
                   cwd=ROOT, check=True, capture_output=True)
    return folder


def command(corpus: Path, run: Path, precision: str) -> list[str]:
    # Checkpoints every 3 steps, log lines every 2: resumed runs begin in the middle of a logged interval.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatron_slm.train",
            "--run.folder", str(run), "--data.tokenizer", f"{corpus}/tok.model", "--data.train", f"[{corpus}/text]", "--data.sequence_length", "32",
            "--model.layers", "2", "--model.hidden_size", "32", "--model.ffn_hidden_size", "64", "--schedule.train_steps", str(STEPS),
            "--selection.scorer", "own_loss", "--selection.keep_fraction", "0.6", "--parallel.distributed_optimizer", "true",
            "--device.precision", precision, "--checkpoint.interval_steps", "3", "--monitoring.log_interval_steps", "2", "--monitoring.wandb.mode", "disabled"]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_to_end(corpus: Path, run: Path, precision: str) -> None:
    done = subprocess.run(command(corpus, run, precision), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def run_and_kill(corpus: Path, run: Path, precision: str, after_step: int) -> None:
    """Start the run; SIGKILL every process of it once metrics.jsonl reaches `after_step`."""
    process = subprocess.Popen(command(corpus, run, precision), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if steps(run) and max(steps(run)) >= after_step:
            break
        time.sleep(0.02)
    group = os.getpgid(process.pid)
    os.killpg(group, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-KILL", "-f", str(run)], check=False)      # workers that torchrun put in groups of their own
    assert steps(run) and max(steps(run)) < STEPS, "killed before the end"


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:      # a line torn by a kill
            pass
    return found


def steps(run: Path) -> list[int]:
    return [record["step"] for record in lines(run) if record["kind"] == "train"]


@pytest.mark.parametrize("precision, kills", [("fp32", (2, 8)), ("bf16", (6,))])     # bf16 has fp32 main weights to restore
def test_killed_runs_continue_with_the_uninterrupted_losses(corpus, tmp_path, precision, kills):
    run_to_end(corpus, tmp_path / "whole", precision)
    for after_step in kills:
        run_and_kill(corpus, tmp_path / "killed", precision, after_step)
    run_to_end(corpus, tmp_path / "killed", precision)

    def compared(run):
        return [{name: value for name, value in record.items() if not name.startswith(NOT_COMPARED)} for record in lines(run) if record["kind"] == "train"]
    assert compared(tmp_path / "killed") == compared(tmp_path / "whole")
