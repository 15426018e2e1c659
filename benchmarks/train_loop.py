"""What a run adds to its steps: the real training loop beside bare steps of the same model.

    python -m benchmarks.train_loop                            small on CPU, TinyLlama on CUDA
    python -m benchmarks.train_loop --layers 2 --hidden 256    smaller
    python -m benchmarks.train_loop --clock wall --threads 2   on an idle machine

The loop is megatron_slm.train's, training.loop.TrainingRun: loader with stored scores, metrics, log
lines every 10 steps into metrics.jsonl and onto the console, agreement on stopping, watchdog, busy
times. The peer is training.step.train_step on one step's batches that are on the device already,
nothing else. Blocks of both take turns in one process on one model and optimizer: after each block
of the loop its hook after_step runs a bare block. Neither has validation or checkpoints, which
training does not do in most steps.

Gate: the loop takes at most 2 % longer. Medians of the blocks' ratios; one JSON line; exit code 1
when the gate is missed. The clock is CPU time by default, which counts the loader's thread too, and
wall time on CUDA, where a block ends when the device has finished it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import device_name
from benchmarks.step import TINYLLAMA
from benchmarks.step_sides import LEARNING_RATE, Shape
from megatron_slm.config.schema import Config, ParallelConfig
from megatron_slm.device import choose_device
from megatron_slm.parallel import Groups, join_job, leave_job
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores

GATE = 1.02
SMALL = Shape(
    layers=4,
    hidden=256,
    feed_forward=704,
    heads=4,
    query_groups=4,
    vocabulary=8000,
    sequence_tokens=256,
    sequences=4,
    precision="fp32",
)
DOCUMENT_TOKENS = 1000


class Turns:
    """Times blocks of the loop and of bare steps; the loop calls it after each of its steps."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.block_steps = options.steps
        self.device = device
        self.wall = options.clock == "wall" or device.type == "cuda"
        self.bare_step: Callable[[], object]
        self.loader: Any
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._began = 0.0

    def after_step(self, step: int, _metrics: object) -> None:
        """Every block_steps steps: end the loop's block, run a bare one, begin the next."""
        if step % self.block_steps:
            return
        ended = self._now()
        self._let_the_loader_rest()
        if not self.wall:  # what was read ahead belongs to the loop
            ended = self._now()
        if step > self.block_steps:  # the first block warms up
            self.loop_seconds.append(ended - self._began)
        began = self._now()
        for _ in range(self.block_steps):
            self.bare_step()
        if step > self.block_steps:
            self.bare_seconds.append(self._now() - began)
        self._began = self._now()

    def _let_the_loader_rest(self) -> None:
        """Wait until it has read ahead as far as it may, so that a bare block shares no core."""
        ready = -1
        while ready != self.loader.ready_steps:
            ready = self.loader.ready_steps
            time.sleep(0.2)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.wall else time.process_time()


def run_config(shape: Shape, folder: Path, steps: int) -> Config:
    """The settings of a run of this shape that neither validates nor saves before its end."""
    config = shape.config()
    config.run.folder = str(folder / "run")
    config.data.tokenizer = "none"
    config.data.train = [str(folder / "corpus")]
    config.selection.reference.scores = [str(folder / "scores")]
    config.schedule.train_steps = steps
    config.optimizer.learning_rate = LEARNING_RATE
    config.checkpoint.interval_steps = 0
    config.monitoring.wandb.mode = "disabled"
    config.monitoring.after_step = "benchmark"
    return config


def write_data(shape: Shape, folder: Path) -> None:
    """A corpus of random tokens and a score of each, as large as 64 global batches."""
    documents = 1 + 64 * shape.tokens // DOCUMENT_TOKENS
    write_corpus(
        folder / "corpus",
        random_documents(documents, DOCUMENT_TOKENS, vocabulary_size=shape.vocabulary),
        vocabulary_size=shape.vocabulary,
    )
    write_scores(
        folder / "scores",
        folder / "corpus",
        lambda offsets: 8.0 + offsets % 3,
        window_tokens=shape.sequence_tokens,
        stride_tokens=shape.sequence_tokens,
        shard_tokens=1 << 20,
        dtype="fp16",
    )


def measure(shape: Shape, groups: Groups, options: argparse.Namespace, folder: Path) -> Turns:
    """Train in the real loop, with bare blocks between its own."""
    from megatron_slm.data.scored_dataset import open_corpora
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.training.loop import TrainingRun
    from megatron_slm.training.outside_parts import OutsideParts
    from megatron_slm.training.rank_batches import on_this_rank
    from megatron_slm.training.setup import RunInputs
    from megatron_slm.training.step import train_step

    write_data(shape, folder)
    config = run_config(shape, folder, options.steps * (options.rounds + 1))
    corpora = open_corpora(config.data.train, config.selection.reference.scores)
    turns = Turns(options, groups.device)
    run = TrainingRun(
        config,
        groups,
        RunInputs(SimpleNamespace(piece=str), corpora, {}, shape.vocabulary),
        parts=OutsideParts(after_step=turns.after_step),
    )
    run.start()
    batches = on_this_rank(run.loader.read_step(0), groups)

    def bare_step() -> None:
        own = [replace(batch, columns=dict(batch.columns)) for batch in batches]
        train_step(run.trainer, own, TrainingProgress(0, 0), LEARNING_RATE)

    turns.bare_step = bare_step
    turns.loader = run.loader
    run.run()
    run.reporter.close("done", 0)
    return turns


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    shape = TINYLLAMA if device.kind == "cuda" else SMALL
    changes = {"layers": options.layers, "hidden": options.hidden, "sequences": options.mbs}
    shape = replace(shape, **{name: value for name, value in changes.items() if value})
    groups = join_job(ParallelConfig(), device, seed=1)
    try:
        with tempfile.TemporaryDirectory(prefix="slm_train_loop_") as folder:
            turns = measure(shape, groups, options, Path(folder))
    finally:
        leave_job()
    row = result(turns, shape, options)
    print(json.dumps(row), flush=True)
    return int(row["missed"])


def result(turns: Turns, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """What is printed: seconds of a step of both sides, their ratio, and where it was measured."""
    ratios = [a / b for a, b in zip(turns.loop_seconds, turns.bare_seconds, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "case": "train-loop",
        "ours": "loop",
        "peer": "bare steps",
        "measure": "time",
        "layers": shape.layers,
        "hidden": shape.hidden,
        "tokens": shape.tokens,
        "precision": shape.precision,
        "device": device_name(turns.device),
        "torch": torch.__version__,
        "threads": options.threads,
        "clock": "wall" if turns.wall else "cpu",
        "blocks": len(ratios),
        "block_steps": options.steps,
        "ours_median_seconds": round(statistics.median(turns.loop_seconds) / options.steps, 5),
        "peer_median_seconds": round(statistics.median(turns.bare_seconds) / options.steps, 5),
        "ratio": round(ratio, 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "gate": GATE,
        "missed": ratio > GATE,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, help="transformer layers")
    parser.add_argument("--hidden", type=int, help="hidden size")
    parser.add_argument("--mbs", type=int, help="sequences of the micro-batch")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
