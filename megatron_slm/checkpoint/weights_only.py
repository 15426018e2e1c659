"""torch.load with weights only, as torch made it: every file of a checkpoint that torch.save wrote
is loaded here.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import IO, Any

import torch


def load_weights_only(stream: IO[bytes], stand_ins: Collection[tuple[Callable, str]] = ()) -> Any:
    """What torch.save wrote, on the CPU.

    `stand_ins` (what to make, name) are made in place of what these names mean elsewhere.

    pickle.UnpicklingError when the stream names anything beyond what torch itself allows; other
    errors when it is damaged.
    """
    with _nothing_added_but(stand_ins):
        return torch.load(stream, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _nothing_added_but(stand_ins: Collection[tuple[Callable, str]]) -> Iterator[None]:
    """Without the classes that megatron-core, on import, allows for the whole process."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(stand_ins))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(added)
