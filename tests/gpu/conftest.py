"""What the GPU tests share."""

import os

import pytest

# fp32 comparisons need fp32 products. torch leaves TF32 off by itself, but Transformer Engine asks
# cuBLAS for it in every fp32 product (4e-4 relative error); this variable overrules any library's
# choice. cuBLAS reads it when it is first used, so it is set before any test runs.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


@pytest.fixture(scope="module")
def groups():
    """One process on one GPU, with megatron-core's groups of size 1."""
    from megatron_slm.config.schema import ParallelConfig
    from megatron_slm.device import choose_device
    from megatron_slm.parallel import join_job, leave_job

    yield join_job(ParallelConfig(), choose_device("cuda"), seed=1)
    leave_job()
