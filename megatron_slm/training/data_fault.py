"""A file that one process can no longer read ends the run on all of them, with the same message.

A rank that failed alone would leave the others waiting in their next collective.
"""

import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

Read = TypeVar("Read")


class DataFault(ValueError):
    """Data that was sound at the start cannot be read any more; all ranks raise it together."""


def share_fault(fault: Exception | None) -> DataFault:
    """The fault of the lowest rank that has one, on every rank.

    Collective: called by every rank, once any rank is known to have a fault.
    """
    described = None
    if fault is not None:
        described = f"{fault} (process {dist.get_rank()} on {socket.gethostname()})"
    of_ranks: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, described)
    return DataFault(next(text for text in of_ranks if text is not None))


def read_together(read: Callable[[], Read], device: torch.device) -> Read:
    """`read()`, called on every rank; DataFault on all of them where a file cannot be read on one.

    One 4-byte all-reduce over the world.
    """
    fault: Exception | None = None
    found: list[Read] = []
    try:
        found.append(read())
    except (ValueError, OSError) as error:
        fault = error
    flag = torch.tensor(int(fault is not None), dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag.item():
        raise share_fault(fault)
    return found[0]
