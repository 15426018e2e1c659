"""A small real run for tests that interrupt it: random text, made by the programs, and trained
through torchrun or in one process.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.end_to_end.warm_programs import run_program

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14
NOT_COMPARED = ("throughput/",)  # times differ; everything else is compared


def make_corpus(folder: Path) -> Path:
    """A small corpus of random text with a tokenizer: folder/text, folder/tok.model."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(60)]
    texts = [" ".join(random.choice(words, 200)) for _ in range(80)]
    text = folder / "text.jsonl"
    tokenizer = folder / "tok"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    _make(
        "tokenizer.train",
        *("--input", text, "--output-prefix", tokenizer, "--vocab-size", "300"),
    )
    _make(
        "data_tools.preprocess",
        *("--input", text, "--tokenizer", f"{tokenizer}.model"),
        *("--output-prefix", folder / "text", "--workers", "1"),
    )
    return folder


def _make(program: str, *words) -> None:
    command = [sys.executable, "-m", program, *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def settings_of(corpus: Path, run: Path, *more: str) -> list[str]:
    """Checkpoints every 3 steps, log lines every 2: resumed runs begin in the middle of a logged
    interval.
    """
    settings = {
        "--run.folder": run,
        "--data.tokenizer": f"{corpus}/tok.model",
        "--data.train": f"[{corpus}/text]",
        "--data.sequence_length": 32,
        "--model.layers": 2,
        "--model.hidden_size": 32,
        "--model.ffn_hidden_size": 64,
        "--schedule.train_steps": STEPS,
        "--selection.scorer": "own_loss",
        "--selection.keep_fraction": 0.6,
        "--parallel.distributed_optimizer": "true",
        "--checkpoint.interval_steps": 3,
        "--monitoring.log_interval_steps": 2,
        "--monitoring.wandb.mode": "disabled",
    }
    return [*(str(word) for pair in settings.items() for word in pair), *more]


def command(
    corpus: Path, run: Path, *settings: str, processes: int = 2, module: str = "megatron_slm.train"
) -> list[str]:
    """The command of a run, under torchrun if it is of several processes."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    start = torchrun if processes > 1 else ()
    return [sys.executable, *start, "-m", module, *settings_of(corpus, run, *settings)]


def train(corpus: Path, run: Path, *settings: str, exit_code: int = 0) -> str:
    """A run of one process from its start to its end, which must be `exit_code`; its output."""
    words = settings_of(corpus, run, *settings)
    done = run_program("megatron_slm.train", *words, exit_code=exit_code)
    return done.stdout + done.stderr


def environment() -> dict:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }


def run_to_end(arguments: list[str], exit_code: int = 0) -> str:
    """Run a command; its output. It must end with `exit_code`."""
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == exit_code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The whole lines of a run's file, also while it is written."""
    path = run / name
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line torn by a kill
            found.append(json.loads(line))
    return found


def compared(run: Path) -> list[dict]:
    """What an interrupted run must have in common with an uninterrupted one: every metric but the
    times.
    """
    records = [record for record in lines(run) if record["kind"] == "train"]
    return [_without_times(record) for record in records]


def _without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith(NOT_COMPARED)}
