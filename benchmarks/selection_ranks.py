"""The part of the selection benchmark that runs over several ranks (gate C11)."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_slm.selection import select_top
from megatron_slm.selection.threshold import kept_tokens

KEEP = 0.6
HEADER = (
    "| tokens | all-gather + topk | gather | radix | auto | auto, capacity known "
    "| KB: all-gather | KB: radix |\n|---|---|---|---|---|---|---|---|"
)


def on_ranks(ranks: int, sizes: list[int], rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank_main, (ranks, folder, sizes, rounds), nprocs=ranks)
        results = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]
    print(
        f"\n### {ranks} ranks over gloo, keep fraction {KEEP}: "
        "CPU ms of the slowest rank (wall ms), KB sent and received per rank\n"
    )
    print(HEADER)
    lines = []
    for tokens in sizes:
        cpu = {}
        wall = {}
        for way in results[0][tokens]:
            cpu[way] = max(result[tokens][way][0] for result in results)
            wall[way] = max(result[tokens][way][1] for result in results)
        for way in ("gather", "radix", "auto", "auto, capacity"):
            lines.append(
                {
                    "case": f"C11 {way}, {ranks} ranks, {tokens} tokens",
                    "cpu_seconds": cpu[way],
                    "wall_seconds": wall[way],
                    "ratio": cpu[way] / cpu["all-gather + topk"],
                    "gate": _gate(way, ranks, tokens),
                }
            )
        cells = " | ".join(
            f"{seconds * 1e3:.2f} ({wall[way] * 1e3:.1f}) {seconds / cpu['all-gather + topk']:.2f}x"
            for way, seconds in cpu.items()
        )
        gathered_kb = 2 * 4 * tokens * (ranks - 1) / ranks / 1e3
        reduced_kb = 3 * 2 * 2 * 8 * 2048 * (ranks - 1) / ranks / 1e3
        print(f"| {tokens} | {cells} | {gathered_kb:.0f} | {reduced_kb:.0f} |")
    return lines


def _gate(way: str, ranks: int, tokens: int) -> float | None:
    if (way, ranks, tokens) == ("radix", 4, 4_194_304):
        return 0.18
    # Without a capacity, auto also finds out how many tokens each rank has, which all-gather + topk
    # takes for granted.
    return {"auto": 1.1, "auto, capacity": 1.0}.get(way)


def _ways(
    rank: int, tokens: int, group: dist.ProcessGroup
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call that returns the mask of this rank's tokens."""
    score = torch.randn(tokens, generator=torch.Generator().manual_seed(rank))
    eligible = torch.ones_like(score, dtype=torch.bool)

    def select(**options) -> torch.Tensor:
        return select_top(score, eligible, KEEP, group=group, **options).mask

    return {
        "all-gather + topk": lambda: _all_gather_topk(score, eligible, group),
        "gather": lambda: select(backend="gather"),
        "radix": lambda: select(backend="radix"),
        "auto": lambda: select(backend="auto"),
        "auto, capacity": lambda: select(capacity=score.numel()),
    }


def _rank_main(rank: int, ranks: int, folder: str, sizes: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    result = {}
    for tokens in sizes:
        ways = _ways(rank, tokens // ranks, group)
        masks = [way() for way in ways.values()]
        assert all(torch.equal(mask, masks[0]) for mask in masks), "the ways disagree"
        # The ways take turns call by call: what else happens on the machine happens to all of them.
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


def _all_gather_topk(
    score: torch.Tensor, eligible: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """What one would write first; membership by topk's indices, which leaves ties to chance."""
    masked = torch.where(eligible, score, -math.inf)
    parts = [torch.empty_like(masked) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, masked, group=group)
    everything = torch.cat(parts)
    kept = kept_tokens(KEEP, int((everything > -math.inf).sum()))
    return topk_mask(everything, kept).view(-1, masked.numel())[dist.get_rank(group)]


def topk_mask(score: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[score.topk(kept, sorted=False).indices] = True
    return mask
