"""Memory that was never written is NaN in these tests, as it may be on any machine."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty and its kin return NaN: a result that reads them shows it in every run.

    Without it, such a fault shows only when an earlier test left a NaN at the same address.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
