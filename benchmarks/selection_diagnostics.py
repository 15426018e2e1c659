"""The part of the selection benchmark that measures the sums and counts describing a choice."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import median_cpu_seconds
from benchmarks.selection_ranks import KEEP
from benchmarks.selection_scaling import MODEL_FLOPS_PER_TOKEN
from megatron_slm.selection import TrainingProgress, select_top
from megatron_slm.selection.diagnostics import describe

QUICKSTART = Path(__file__).resolve().parents[1] / "launch/recipes/quickstart.yaml"
VOCABULARY_SIZE = 4000
FRACTION_GATE = 0.005
"""Of the step's time, at most."""


def description_cost(rounds: int, sequences: int = 4, length: int = 2048) -> list[dict]:
    """describe() against the floating-point work of a 1.1 B model's step on this core.

    The latter is computed from the measured time of one fp32 matrix product.
    """
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(sequences, length, generator=generator) * 6
    columns = {
        "loss": loss,
        "reference_loss": loss + torch.randn(loss.shape, generator=generator) * 0.5,
        "position": torch.arange(length).expand(sequences, length),
        "corpus_id": torch.arange(sequences) % 3,
    }
    score = loss - columns["reference_loss"]
    eligible = torch.ones_like(loss, dtype=torch.bool)
    selection = select_top(score, eligible, KEEP)
    matrix = torch.randn(1024, 1024)
    ways = {
        "describe": lambda: describe(
            columns, score, eligible, selection, sequence_length=length, corpora=3
        ),
        "select_top": lambda: select_top(score, eligible, KEEP),
        "matrix product": lambda: matrix @ matrix,
    }
    seconds = median_cpu_seconds(ways, rounds * 5)
    step_seconds = MODEL_FLOPS_PER_TOKEN * loss.numel() * seconds["matrix product"] / (2 * 1024**3)
    print(
        f"\n### {loss.numel()} tokens on one core, fraction of a 1.1 B-parameter step on the same "
        f"core ({step_seconds:.0f} s)\n\n| what | CPU ms | fraction |\n|---|---|---|"
    )
    lines = []
    for name in ("describe", "select_top"):
        fraction = seconds[name] / step_seconds
        print(f"| {name} | {seconds[name] * 1e3:.2f} | {fraction:.7f} |")
        lines.append(_line(f"{name} as a fraction of the step", seconds[name], fraction))
    return lines


def diagnostics_in_training(rounds: int, log_interval_steps: int = 10) -> list[dict]:
    """CPU time of diagnostics inside real optimizer steps of the quickstart model (excess_loss).

    One process, one core. Counted: describing every micro-batch, adding the sums up, and the part
    of each log line's reduction and summary that falls on one step.
    """
    # A process of its own: on a CPU, stand-ins for torch.cuda are put in place before megatron-core
    # is imported.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds = pool.apply(
            _train_quickstart_model, (rounds * log_interval_steps, log_interval_steps)
        )
    step_seconds = seconds.pop("step")
    total_seconds = sum(seconds.values())
    print(
        f"\n### Diagnostics in training: quickstart model, {step_seconds * 1e3:.0f} CPU ms a step "
        "on one core\n\n| what | CPU ms a step | fraction |\n|---|---|---|"
    )
    for name, value in [*seconds.items(), ("all", total_seconds)]:
        print(f"| {name} | {value * 1e3:.3f} | {value / step_seconds:.3%} |")
    case = "diagnostics as a fraction of a step of the quickstart model"
    return [_line(case, total_seconds, total_seconds / step_seconds)]


def _line(case: str, cpu_seconds: float, fraction: float) -> dict:
    return {"case": case, "cpu_seconds": cpu_seconds, "ratio": fraction, "gate": FRACTION_GATE}


class _Stopwatch:
    """CPU seconds of every call of some functions, by name."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        seconds = self.taken[name] = []

        def call(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.process_time() - start)

        return call

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.taken.items()}


def _train_quickstart_model(steps: int, log_interval_steps: int) -> dict[str, float]:
    """Median CPU seconds of a step, and per step of each part of the diagnostics."""
    torch.set_num_threads(1)
    from megatron_slm.config.load import load_yaml
    from megatron_slm.device import choose_device
    from megatron_slm.parallel import join_job, leave_job

    config = load_yaml(QUICKSTART)
    config.parallel.distributed_optimizer = False
    config.selection.scorer = "excess_loss"
    config.selection.reference.scores = ["synthetic"]
    groups = join_job(config.parallel, choose_device("cpu"), 0)
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.step import train_step

    trainer = _trainer(config, groups)
    metrics = Metrics(groups.device)
    watch = _Stopwatch()
    trainer.selector.describe = watch.timed("describe", trainer.selector.describe)
    add = watch.timed("add up", metrics.add_all)
    reduce = watch.timed(
        "reduce, per log line", lambda: metrics.reduce(groups.dp_cp, summarise=summarise)
    )
    step = watch.timed("step", train_step)
    generator = torch.Generator().manual_seed(0)
    micro_batches = config.data.global_batch_size // config.data.micro_batch_size
    for number in range(steps):
        batches = [_random_batch(config, index, generator) for index in range(micro_batches)]
        add(step(trainer, batches, TrainingProgress(number, 0), 1e-4).measured)
        if (number + 1) % log_interval_steps == 0:
            reduce()
    leave_job()
    medians = watch.medians()
    medians["describe"] *= micro_batches
    medians["reduce, per log line"] /= log_interval_steps
    return medians


def _trainer(config, groups):
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.training.step import Trainer
    from megatron_slm.training.token_selector import TokenSelector

    models = wrap_data_parallel(build_model(config, VOCABULARY_SIZE, groups), config)
    selector = TokenSelector(
        config.selection, groups, sequence_length=config.data.sequence_length, corpora=1
    )
    return Trainer(models, build_optimizer(models, config), selector, groups)


def _random_batch(config, index: int, generator: torch.Generator):
    from megatron_slm.data.batch import Batch

    sequences, length = config.data.micro_batch_size, config.data.sequence_length
    shape = (sequences, length)
    text = torch.randint(0, VOCABULARY_SIZE, (sequences, length + 1), generator=generator)
    return Batch(
        text[:, :-1].contiguous(),
        text[:, 1:].contiguous(),
        torch.ones(shape),
        torch.arange(length).expand(shape),
        torch.arange(sequences * length).view(shape) + index * 10**6,
        torch.zeros(sequences, dtype=torch.int64),
        {"reference_loss": torch.rand(shape, generator=generator) * 2 + 7},
    )
