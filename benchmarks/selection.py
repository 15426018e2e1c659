"""Time and bytes of exact selection, beside the obvious way: torch.topk of an all-gather.

    python benchmarks/selection.py                       everything, about 6 minutes on 2 cores
    python benchmarks/selection.py --part one-process    gate C10 (gates: benchmarks/RESULTS.md)
    python benchmarks/selection.py --part ranks --ranks 4 --tokens 4194304        gate C11
    python benchmarks/selection.py --part diagnostics    the sums and counts, beside real training steps of the quickstart model
    python benchmarks/selection.py --part scaling        to 512 ranks and 16 M tokens, from measured parts

Both sides run in the same processes in alternating rounds; figures are medians. CPU seconds are of one rank, all its threads (the slowest
rank), and are what to read on a shared machine. Answers are compared in the same run. Exit code 1 when a gate is missed by more than 3 %.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_slm.selection import select_top
from megatron_slm.selection.diagnostics import describe
from megatron_slm.selection.populations import GATHER_MAX_TOKENS_ACCELERATOR
from megatron_slm.selection.radix import kth_largest_score
from megatron_slm.selection.select import rankable
from megatron_slm.selection.threshold import (
    find_threshold,
    kept_tokens,
    quickselect,
)

KEEP = 0.6
TOLERANCE = 1.03  # a gate counts as missed beyond this
# The stated model of a cluster: one NVLink/InfiniBand hop, 400 Gb/s per GPU, 400 TFLOP/s sustained of a 1.1 B-parameter model's 6 FLOP per
# parameter and token, 4.3 TB/s memory. Replace them with your own.
HOP_SECONDS, LINK_BYTES_PER_SECOND = 10e-6, 50e9
MODEL_FLOPS_PER_TOKEN, SUSTAINED_FLOPS = 6 * 1.1e9, 400e12
MEMORY_BYTES_PER_SECOND, KERNEL_SECONDS = 4.3e12, 5e-6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part",
        choices=["all", "one-process", "ranks", "describe", "diagnostics", "scaling"],
        default="all",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8], help="processes of the part `ranks`"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[16_384, 65_536, 262_144, 1_048_576, 4_194_304],
        help="over all ranks",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append one line per case to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines: list[dict] = []
    if options.part in ("all", "one-process"):
        lines += one_process(max(options.tokens), options.rounds)
    if options.part in ("all", "ranks"):
        for ranks in options.ranks:
            lines += on_ranks(ranks, options.tokens, options.rounds)
    if options.part in ("all", "describe"):
        lines += description_cost(options.rounds)
    if options.part in ("all", "diagnostics"):
        lines += diagnostics_in_training(options.rounds)
    if options.part in ("all", "scaling"):
        lines += scaling(options.rounds)
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    missed = [
        line for line in lines if line.get("gate") and line["ratio"] > line["gate"] * TOLERANCE
    ]
    for line in missed:
        print(
            f"GATE MISSED: {line['case']}: {line['ratio']:.3f}, allowed {line['gate']:.3f}",
            file=sys.stderr,
        )
    return 1 if missed else 0


# ---- one process: C10 ----


def one_process(tokens: int, rounds: int) -> list[dict]:
    score = torch.randn(tokens, generator=torch.Generator().manual_seed(0))
    eligible = torch.ones_like(score, dtype=torch.bool)
    kept = kept_tokens(KEEP, tokens)
    ranked = rankable(score, eligible)
    ways = {
        "threshold: ours (quickselect)": lambda: quickselect(ranked.numpy(), tokens - kept),
        "threshold: ours, with all counts": lambda: find_threshold(ranked, KEEP, None).score,
        "threshold: ours (radix)": lambda: kth_largest_score(ranked, KEEP, None)[0],
        "threshold: torch.kthvalue": lambda: float(ranked.kthvalue(tokens - kept + 1).values),
        "threshold: torch.topk": lambda: float(ranked.topk(kept, sorted=False).values.min()),
        "threshold: torch.sort": lambda: float(ranked.sort(descending=True).values[kept - 1]),
        "mask: ours (select_top)": lambda: select_top(score, eligible, KEEP).mask,
        "mask: torch.topk": lambda: _obvious_mask(ranked, kept),
    }
    answers = {name: way() for name, way in ways.items()}
    assert len({answer for name, answer in answers.items() if name.startswith("threshold")}) == 1
    assert torch.equal(answers["mask: ours (select_top)"], answers["mask: torch.topk"])
    seconds = _alternate(ways, rounds, time.process_time)
    peers = {"threshold": seconds["threshold: torch.kthvalue"], "mask": seconds["mask: torch.topk"]}
    lines = []
    print(
        f"\n### One process, {tokens} tokens, keep fraction {KEEP}, CPU ms\n\n| what | CPU ms | of the peer | gate |\n|---|---|---|---|"
    )
    for name, value in seconds.items():
        ratio = value / peers[name.split(":")[0]]
        gate = 0.12 if name == "threshold: ours (quickselect)" else None
        lines.append(
            {"case": f"C10 {name}, {tokens}", "cpu_seconds": value, "ratio": ratio, "gate": gate}
        )
        print(f"| {name} | {value * 1e3:.1f} | {ratio:.3f} | {f'C10 {gate}' if gate else ''} |")
    return lines


def _obvious_mask(score: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.topk(kept, sorted=False).indices] = True
    return mask


def _alternate(ways: dict, rounds: int, clock) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


# ---- several ranks: C11 ----


def on_ranks(ranks: int, sizes: list[int], rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank_main, (ranks, folder, sizes, rounds), nprocs=ranks)
        results = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]
    lines = []
    print(
        f"\n### {ranks} ranks over gloo, keep fraction {KEEP}: CPU ms of the slowest rank (wall ms), KB sent and received per rank\n"
    )
    print(
        "| tokens | obvious: all-gather + topk | gather | radix | auto | auto, capacity known | KB: all-gather | KB: radix |\n|---|---|---|---|---|---|---|---|"
    )
    for tokens in sizes:
        cpu = {way: max(result[tokens][way][0] for result in results) for way in results[0][tokens]}
        wall = {
            way: max(result[tokens][way][1] for result in results) for way in results[0][tokens]
        }
        for way in ("gather", "radix", "auto", "auto, capacity"):
            # without a capacity, auto also finds out how many tokens each rank has, which the obvious way takes for granted
            gate = (
                0.18
                if (way, ranks, tokens) == ("radix", 4, 4_194_304)
                else {"auto": 1.1, "auto, capacity": 1.0}.get(way)
            )
            ratio = cpu[way] / cpu["obvious"]
            lines.append(
                {
                    "case": f"C11 {way}, {ranks} ranks, {tokens} tokens",
                    "cpu_seconds": cpu[way],
                    "wall_seconds": wall[way],
                    "ratio": ratio,
                    "gate": gate,
                }
            )
        cells = " | ".join(
            f"{cpu[way] * 1e3:.2f} ({wall[way] * 1e3:.1f}) {cpu[way] / cpu['obvious']:.2f}x"
            for way in cpu
        )
        gathered, reduced = (
            2 * 4 * tokens * (ranks - 1) / ranks / 1e3,
            3 * 2 * 2 * 8 * 2048 * (ranks - 1) / ranks / 1e3,
        )
        print(f"| {tokens} | {cells} | {gathered:.0f} | {reduced:.0f} |")
    return lines


def _ways(
    rank: int, tokens: int, group: dist.ProcessGroup
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call that returns the mask of this rank's tokens."""
    score = torch.randn(tokens, generator=torch.Generator().manual_seed(rank))
    eligible = torch.ones_like(score, dtype=torch.bool)

    def select(**options) -> torch.Tensor:
        return select_top(score, eligible, KEEP, group=group, **options).mask

    return {
        "obvious": lambda: _all_gather_topk(score, eligible, group),
        "gather": lambda: select(backend="gather"),
        "radix": lambda: select(backend="radix"),
        "auto": lambda: select(backend="auto"),
        "auto, capacity": lambda: select(capacity=score.numel()),
    }


def _rank_main(rank: int, ranks: int, folder: str, sizes: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks
    )
    group, result = dist.group.WORLD, {}
    for tokens in sizes:
        ways = _ways(rank, tokens // ranks, group)
        masks = [way() for way in ways.values()]
        assert all(torch.equal(mask, masks[0]) for mask in masks), "the ways disagree"
        # the ways take turns call by call, so that what else happens on the machine happens to all of them
        repeats = max(1, min(50, 2_000_000 // tokens))
        taken = {way: [] for way in ways}
        for _ in range(rounds * repeats):
            for way, call in ways.items():
                dist.barrier()
                cpu, wall = time.process_time(), time.perf_counter()
                call()
                taken[way].append((time.process_time() - cpu, time.perf_counter() - wall))
        result[tokens] = {
            way: tuple(map(statistics.median, zip(*values, strict=True)))
            for way, values in taken.items()
        }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _all_gather_topk(score: torch.Tensor, eligible: torch.Tensor, group) -> torch.Tensor:
    """What one would write first; membership by topk's indices, which leaves ties to chance."""
    masked = torch.where(eligible, score, -math.inf)
    parts = [torch.empty_like(masked) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, masked, group=group)
    everything = torch.cat(parts)
    kept = kept_tokens(KEEP, int((everything > -math.inf).sum()))
    return _obvious_mask(everything, kept).view(-1, masked.numel())[dist.get_rank(group)]


# ---- the sums that describe a choice ----


def description_cost(rounds: int, sequences: int = 4, length: int = 2048) -> list[dict]:
    """describe() against the floating point work of a 1.1 B model's step on this core, measured as one fp32 matrix product."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(sequences, length, generator=generator) * 6
    columns = {
        "loss": loss,
        "reference_loss": loss + torch.randn(loss.shape, generator=generator) * 0.5,
    }
    columns |= {
        "position": torch.arange(length).expand(sequences, length),
        "corpus_id": torch.arange(sequences) % 3,
    }
    score, eligible = loss - columns["reference_loss"], torch.ones_like(loss, dtype=torch.bool)
    selection = select_top(score, eligible, KEEP)
    matrix = torch.randn(1024, 1024)
    ways = {
        "describe": lambda: describe(
            columns, score, eligible, selection, sequence_length=length, corpora=3
        ),
        "select_top": lambda: select_top(score, eligible, KEEP),
        "matrix product": lambda: matrix @ matrix,
    }
    seconds = _alternate(ways, rounds * 5, time.process_time)
    step = MODEL_FLOPS_PER_TOKEN * loss.numel() * seconds["matrix product"] / (2 * 1024**3)
    print(
        f"\n### {loss.numel()} tokens on one core, share of a 1.1 B-parameter step on the same core ({step:.0f} s)\n\n| what | CPU ms | share |\n|---|---|---|"
    )
    lines = []
    for name in ("describe", "select_top"):
        share = seconds[name] / step
        print(f"| {name} | {seconds[name] * 1e3:.2f} | {share:.7f} |")
        lines.append(
            {
                "case": f"{name} as a share of the step",
                "cpu_seconds": seconds[name],
                "ratio": share,
                "gate": 0.005,
            }
        )
    return lines


def diagnostics_in_training(rounds: int, log_interval_steps: int = 10) -> list[dict]:
    """CPU time inside real optimizer steps (quickstart model, excess_loss, one process, one core) that goes into diagnostics.

    Counted: describing every micro-batch, adding the sums up, and a share of the reduction and summary of every log line.
    """
    import multiprocessing as processes

    # A process of its own: on a CPU, stand-ins for torch.cuda are put in place before megatron-core is imported.
    with processes.get_context("spawn").Pool(1) as pool:
        result = pool.apply(
            _train_quickstart_model, (rounds * log_interval_steps, log_interval_steps)
        )
    step, parts = (
        result["step"],
        {name: seconds for name, seconds in result.items() if name != "step"},
    )
    share = sum(parts.values()) / step
    print(
        f"\n### Diagnostics in training: quickstart model, {result['step'] * 1e3:.0f} CPU ms a step on one core\n\n| what | CPU ms a step | share |\n|---|---|---|"
    )
    for name, seconds in [*parts.items(), ("all", sum(parts.values()))]:
        print(f"| {name} | {seconds * 1e3:.3f} | {seconds / step:.3%} |")
    return [
        {
            "case": "diagnostics as a share of a step of the quickstart model",
            "cpu_seconds": sum(parts.values()),
            "ratio": share,
            "gate": 0.005,
        }
    ]


def _train_quickstart_model(steps: int, log_interval_steps: int) -> dict[str, float]:
    """Median CPU seconds of a step, and per step of each part of the diagnostics."""
    torch.set_num_threads(1)
    from megatron_slm.config.load import load_yaml
    from megatron_slm.device import choose_device
    from megatron_slm.parallel import join_job, leave_job

    config = load_yaml(Path(__file__).resolve().parents[1] / "launch/recipes/quickstart.yaml")
    config.parallel.distributed_optimizer = False
    config.selection.scorer, config.selection.reference.scores = "excess_loss", ["synthetic"]
    groups = join_job(config.parallel, choose_device("cpu"), 0)
    from megatron_slm.data.batch import Batch
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.step import Trainer, train_step
    from megatron_slm.training.token_selector import TokenSelector

    data, choice, vocabulary_size = config.data, config.selection, 4000
    models = wrap_data_parallel(build_model(config, vocabulary_size, groups), config)
    selector = TokenSelector(choice, groups, sequence_length=data.sequence_length, corpora=1)
    trainer = Trainer(models, build_optimizer(models, config), selector, groups)
    metrics, generator, taken = (
        Metrics(groups.device),
        torch.Generator().manual_seed(0),
        {"describe": [], "add up": [], "reduce, per log line": [], "step": []},
    )

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken[name].append(time.process_time() - start)

        return call

    def batch(number: int) -> Batch:
        shape = (data.micro_batch_size, data.sequence_length)
        text = torch.randint(0, vocabulary_size, (shape[0], shape[1] + 1), generator=generator)
        position = torch.arange(shape[1]).expand(shape)
        return Batch(
            text[:, :-1].contiguous(),
            text[:, 1:].contiguous(),
            torch.ones(shape),
            position,
            torch.arange(shape[0] * shape[1]).view(shape) + number * 10**6,
            torch.zeros(shape[0], dtype=torch.int64),
            {"reference_loss": torch.rand(shape, generator=generator) * 2 + 7},
        )

    selector.describe, add = timed("describe", selector.describe), timed("add up", metrics.add_all)
    reduce, step = (
        timed("reduce, per log line", lambda: metrics.reduce(groups.dp_cp, summarise=summarise)),
        timed("step", train_step),
    )
    for number in range(steps):
        batches = [batch(i) for i in range(data.global_batch_size // data.micro_batch_size)]
        add(step(trainer, batches, TrainingProgress(number, 0), 1e-4).measured)
        if (number + 1) % log_interval_steps == 0:
            reduce()
    leave_job()
    medians = {name: statistics.median(values) for name, values in taken.items()}
    medians["describe"] *= len(batches)
    medians["reduce, per log line"] /= log_interval_steps
    return medians


# ---- to 512 ranks, from measured parts ----


def scaling(rounds: int) -> list[dict]:
    """The stated model, t = work + collectives; checks on the way that 512 ranks' counts give the answer of one quickselect.

    all-reduce of b bytes over R ranks: 2 log2(R) hops + 2 b (R-1)/R / bandwidth. All-gather of b bytes: log2(R) hops + b (R-1)/R / bandwidth.
    Work on an accelerator is passes over memory at its bandwidth plus 5 us a kernel: topk and its mask 10 passes and 25 kernels, a sort
    and its counts 12 passes and 25 kernels, radix 12 passes over the rank's own tokens and 60 kernels. auto knows the capacity, as training does.
    """
    score = torch.randn(16_777_216, generator=torch.Generator().manual_seed(0))
    assert kth_largest_score(score, KEEP, None) == _as_tuple(find_threshold(score, KEEP, None))
    sample = score[:1_048_576]
    cpu = _alternate(
        {
            "radix": lambda: kth_largest_score(sample, KEEP, None),
            "topk": lambda: sample.topk(600_000, sorted=False),
        },
        rounds,
        time.process_time,
    )
    print(
        "\n### Computed: one selection over all tokens of a step, milliseconds (share of the step of a 1.1 B model)\n"
    )
    print(
        f"Measured on one CPU core: radix {cpu['radix'] / 2**20 * 1e9:.1f} ns per token, topk {cpu['topk'] / 2**20 * 1e9:.1f} ns per token.\n"
    )
    print(
        "| ranks | tokens per step | step, ms | obvious, accelerator | auto, accelerator | | obvious, CPU ranks | radix, CPU ranks |\n|---|---|---|---|---|---|---|---|"
    )
    lines = []
    for ranks in (8, 32, 128, 512):
        for tokens in (1_048_576, 4_194_304, 16_777_216):
            step = MODEL_FLOPS_PER_TOKEN * tokens / ranks / SUSTAINED_FLOPS
            hops = math.log2(ranks) * HOP_SECONDS
            gather = hops + 4 * tokens * (ranks - 1) / ranks / LINK_BYTES_PER_SECOND
            reduce = 3 * (2 * hops + 2 * 8 * 2048 * (ranks - 1) / ranks / LINK_BYTES_PER_SECOND)
            obvious = gather + _device_seconds(10, tokens, 25)
            way = "gather" if tokens <= GATHER_MAX_TOKENS_ACCELERATOR else "radix"
            ours = (
                gather + _device_seconds(12, tokens, 25)
                if way == "gather"
                else reduce + _device_seconds(12, tokens / ranks, 60)
            )
            cpu_ranks = (
                gather + cpu["topk"] / 2**20 * tokens,
                reduce + cpu["radix"] / 2**20 * tokens / ranks,
            )
            cells = f"{obvious * 1e3:.2f} ({obvious / step:.2%}) | {ours * 1e3:.2f} ({ours / step:.2%}) | {way}"
            print(
                f"| {ranks} | {tokens} | {step * 1e3:.0f} | {cells} | {cpu_ranks[0] * 1e3:.1f} | {cpu_ranks[1] * 1e3:.1f} |"
            )
            lines.append(
                {
                    "case": f"scaling, {ranks} ranks, {tokens} tokens",
                    "seconds": ours,
                    "ratio": ours / step,
                    "gate": 0.01,
                }
            )
    return lines


def _device_seconds(passes: int, tokens: float, kernels: int) -> float:
    return passes * 4 * tokens / MEMORY_BYTES_PER_SECOND + kernels * KERNEL_SECONDS


def _as_tuple(threshold) -> tuple:
    return threshold.score, threshold.kept, threshold.eligible, threshold.ties, threshold.ties_kept


if __name__ == "__main__":
    sys.exit(main())
