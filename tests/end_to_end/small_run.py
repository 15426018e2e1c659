"""A small real run for tests that interrupt it: random text, made by the programs, trained through torchrun or in one process."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14
NOT_COMPARED = ("throughput/",)  # times differ; everything else is compared


def make_corpus(folder: Path) -> Path:
    """A small corpus of random text with a tokenizer: folder/text, folder/tok.model."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(60)]
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(random.choice(words, 200))}) + "\n" for _ in range(80))
    )
    run = [sys.executable, "-m"]
    subprocess.run(
        [
            *run,
            "tokenizer.train",
            "--input",
            folder / "text.jsonl",
            "--output-prefix",
            folder / "tok",
            "--vocab-size",
            "300",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            *run,
            "data_tools.preprocess",
            "--input",
            folder / "text.jsonl",
            "--tokenizer",
            folder / "tok.model",
            "--output-prefix",
            folder / "text",
            "--workers",
            "1",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def command(
    corpus: Path, run: Path, *settings: str, processes: int = 2, module: str = "megatron_slm.train"
) -> list[str]:
    """Checkpoints every 3 steps, log lines every 2: resumed runs begin in the middle of a logged interval."""
    start = (
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            module,
        ]
        if processes > 1
        else ["-m", module]
    )
    return [
        sys.executable,
        *start,
        "--run.folder",
        str(run),
        "--data.tokenizer",
        f"{corpus}/tok.model",
        "--data.train",
        f"[{corpus}/text]",
        "--data.sequence_length",
        "32",
        "--model.layers",
        "2",
        "--model.hidden_size",
        "32",
        "--model.ffn_hidden_size",
        "64",
        "--schedule.train_steps",
        str(STEPS),
        "--selection.scorer",
        "own_loss",
        "--selection.keep_fraction",
        "0.6",
        "--parallel.distributed_optimizer",
        "true",
        "--checkpoint.interval_steps",
        "3",
        "--monitoring.log_interval_steps",
        "2",
        "--monitoring.wandb.mode",
        "disabled",
        *settings,
    ]


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
    path, found = run / name, []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line torn by a kill
            found.append(json.loads(line))
    return found


def compared(run: Path) -> list[dict]:
    """What an interrupted run must have in common with an uninterrupted one: every metric but the times."""
    return [
        {name: value for name, value in record.items() if not name.startswith(NOT_COMPARED)}
        for record in lines(run)
        if record["kind"] == "train"
    ]
