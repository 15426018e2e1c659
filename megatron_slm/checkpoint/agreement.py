"""Collectives by which the ranks of a job agree about a checkpoint. Every rank calls them
together.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_slm.checkpoint.folder import damaged_files


def first_problem(problem: str) -> str:
    """The first problem that any rank has, on all ranks; "" = none has one."""
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")


def all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on every rank; one 8-byte all-reduce over the world."""
    return sum_over_ranks(int(not flag), device) == 0


def sum_over_ranks(number: int, device: torch.device) -> int:
    """The sum of a whole number over the world."""
    total = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total.item())


def damaged_files_of(checkpoint: Path) -> list[str]:
    """folder.damaged_files, with the checksums computed by all ranks; the same list on all."""
    damaged = damaged_files(checkpoint, (dist.get_rank(), dist.get_world_size()))
    by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, damaged)
    return sorted({name for names in by_rank for name in names})
