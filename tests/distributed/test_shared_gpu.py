"""The backend of processes that share a GPU, on CPU processes: the same copies, no GPU. Layouts
over it against plain torch, and every collective against gloo itself.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_slm.shared_gpu import STAGED_GLOO
from megatron_slm.testing.spawn import run_layouts_on_cpu
from tests.distributed.test_layouts import assert_equals_plain, plain_rows, train_in_layout

CASE = "data_parallel"
LAYOUTS = {
    "single": dict(cases=(CASE,)),
    "tp2_sequence_parallel": dict(tp=2, sequence_parallel=True, cases=(CASE,)),
    "pp2": dict(pp=2, cases=(CASE,)),
    "pp2_virtual2": dict(pp=2, vpp=2, cases=(CASE,)),
    "cp2": dict(cp=2, cases=(CASE,)),
    "dp2_overlap": dict(dp=2, distributed_optimizer=True, overlap=True, cases=(CASE,)),
}
"""name -> parallel sizes and options, for two processes."""


def collectives(groups, name) -> dict[str, list[torch.Tensor]]:
    """What every collective that the backend has gives this rank."""
    rank, group = groups.world_rank, groups.dp
    own = torch.arange(6.0).view(2, 3) + 10 * rank
    found = {}
    found["all_reduce"] = [own.clone()]
    dist.all_reduce(found["all_reduce"][0], group=group)
    found["all_reduce_max"] = [own.t().contiguous().t()]  # no contiguous memory
    dist.all_reduce(found["all_reduce_max"][0], op=dist.ReduceOp.MAX, group=group)
    found["broadcast"] = [own.clone()]
    dist.broadcast(found["broadcast"][0], 1, group=group)
    found["reduce"] = [own.clone()]
    dist.reduce(found["reduce"][0], 1, group=group)
    if rank == 0:
        found.pop("reduce")  # undefined where the result does not go
    found["all_gather"] = [torch.zeros(2, 3) for _ in range(2)]
    dist.all_gather(found["all_gather"], own, group=group)
    found["all_gather_into_tensor"] = [torch.zeros(4, 3)]
    dist.all_gather_into_tensor(found["all_gather_into_tensor"][0], own, group=group)
    found["reduce_scatter_tensor"] = [torch.zeros(1, 3)]
    dist.reduce_scatter_tensor(found["reduce_scatter_tensor"][0], own, group=group)
    found["reduce_scatter"] = [torch.zeros(3)]
    dist.reduce_scatter(found["reduce_scatter"][0], list(own.unbind(0)), group=group)
    found["all_to_all_single"] = [torch.zeros(2, 3)]
    dist.all_to_all_single(found["all_to_all_single"][0], own, [1, 1], [1, 1], group=group)
    parts = [torch.zeros(2, 3) for _ in range(2)] if rank == 1 else None
    dist.gather(own, parts, dst=1, group=group)
    found["gather"] = parts or []
    found["scatter"] = [torch.zeros(2, 3)]
    dist.scatter(found["scatter"][0], [own, own + 1] if rank == 0 else None, src=0, group=group)
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": 0}, {"rank": 1}]
    dist.barrier(group=group)
    found["batch_isend_irecv"] = [torch.zeros(2, 3)]
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, own, 1 - rank),
            dist.P2POp(dist.irecv, found["batch_isend_irecv"][0], 1 - rank),
        ]
    )
    for work in works:
        work.wait()
    handle = dist.all_reduce(own, group=group, async_op=True)
    handle.wait()
    handle.wait()  # the result is copied once
    found["asynchronous"] = [own]
    found["backend"] = [torch.tensor(dist.get_backend(group) == STAGED_GLOO)]
    return found


def test_every_collective_is_that_of_gloo():
    layout = {"dp2": dict(dp=2)}
    plain = run_layouts_on_cpu(collectives, layout)["dp2"]
    staged = run_layouts_on_cpu(collectives, layout, backend=STAGED_GLOO)["dp2"]
    for expected, found in zip(plain, staged, strict=True):
        assert not expected.pop("backend")[0]
        assert found.pop("backend")[0], "the collectives did not run over the staged backend"
        assert found.keys() == expected.keys()
        for name, tensors in expected.items():
            assert all(map(torch.equal, found[name], tensors)), name


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(train_in_layout, LAYOUTS, LAYOUTS, backend=STAGED_GLOO)


@pytest.fixture(scope="module")
def plain(results):
    return plain_rows(CASE, results["single"][0][CASE]["before"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_over_it_equal_plain_torch(name, results, plain):
    assert_equals_plain(results[name], CASE, plain)
