"""What the GPU tests share."""

import pytest


@pytest.fixture(scope="module")
def groups():
    """One process on one GPU, with megatron-core's groups of size 1."""
    from megatron_slm import device, parallel
    from megatron_slm.config.schema import ParallelConfig

    yield parallel.start(ParallelConfig(), device.choose("cuda"), seed=1)
    parallel.stop()
