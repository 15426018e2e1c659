"""Two processes on one GPU in tensor, pipeline, context and data parallelism, against plain torch
on the CPU: streams, overlap and CUDA memory with more than one rank. Skipped without CUDA.
"""

import pytest
import torch

from megatron_slm.testing.spawn import run_layouts_on_shared_gpu
from tests.distributed.test_layouts import assert_equals_plain, plain_rows, train_in_layout
from tests.distributed.test_shared_gpu import CASE, LAYOUTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def results():
    """All layouts in one pair of processes, which see the first GPU alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        return run_layouts_on_shared_gpu(train_in_layout, LAYOUTS, LAYOUTS)


@pytest.fixture(scope="module")
def plain(results):
    return plain_rows(CASE, results["single"][0][CASE]["before"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_two_processes_on_one_gpu_equal_plain_torch(name, results, plain):
    """fp32, ten steps: the same tokens, losses and gradient norms; after them the same weights."""
    assert_equals_plain(results[name], CASE, plain)
