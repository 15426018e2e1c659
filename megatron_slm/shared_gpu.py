"""Several processes on one GPU: a developer's switch, for tests of more than one rank.

NCCL refuses two ranks on one GPU, and gloo sends from the CPU's memory only. With SLM_SHARED_GPU=1
every collective and every message goes through a copy in the CPU's memory and over gloo, so that a
machine with one GPU can exercise streams, overlap and CUDA memory with more than one rank. It is
slow, and it is refused wherever each process has a GPU of its own, so that a normal run can neither
need it nor be slowed by it.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
)

SWITCH = "SLM_SHARED_GPU"
STAGED_GLOO = "staged_gloo"
"""The backend's name in torch.distributed."""


def sharing_is_requested() -> bool:
    """Whether the switch is set. ValueError when its value means nothing."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "1"):
        raise ValueError(f"{SWITCH}: got {value!r}; expected 1, or leave it out")
    return value == "1"


def shared_gpu(gpus: int) -> int:
    """The GPU of this process among the `gpus` of the machine, LOCAL_RANK modulo their number.

    ValueError where there is nothing to share: without CUDA, on several machines, and where there
    are as many GPUs as processes.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    expected = "it is for tests of several processes on one GPU; unset it"
    if gpus == 0:
        raise ValueError(f"{SWITCH} is 1, but torch sees no CUDA device to share; {expected}")
    if world_size != processes:
        raise ValueError(
            f"{SWITCH} is 1 in a job of {world_size} processes, {processes} of them on this "
            f"machine; {expected}"
        )
    if processes <= gpus:
        raise ValueError(
            f"{SWITCH} is 1, but {processes} processes have {gpus} GPUs, one each; {expected}"
        )
    return int(os.environ.get("LOCAL_RANK", 0)) % gpus


def register_staged_gloo() -> None:
    """Make the backend known to torch.distributed; a second call does nothing."""
    if not hasattr(dist.Backend, STAGED_GLOO.upper()):
        dist.Backend.register_backend(STAGED_GLOO, StagedGloo, devices=["cpu", "cuda"])


# torch's stubs list overloads that torch.distributed itself never calls on a backend in Python.
_ProcessGroup: Any = dist.ProcessGroup


class StagedGloo(_ProcessGroup):
    """gloo on copies in the CPU's memory.

    What a caller of torch.distributed gets is that of gloo, for tensors of any device. Copies to
    the CPU wait for the work that the current stream has been given; the result is copied back in
    `wait`, as of any asynchronous collective, in the order of the stream that waits.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def getBackendName(self) -> str:
        return STAGED_GLOO

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> "StagedWork":
        hosts = _on_host(tensors)
        reduction = _reduction(opts)
        works = [self._gloo.allreduce([host], reduction) for host in hosts]
        return StagedWork(works, tensors, hosts)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> "StagedWork":
        hosts = _on_host(tensors)
        return StagedWork([self._gloo.broadcast(hosts, opts)], tensors, hosts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> "StagedWork":
        hosts = _on_host(tensors)
        return StagedWork([self._gloo.reduce(hosts, opts)], tensors, hosts)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> "StagedWork":
        opts = opts or AllgatherOptions()
        host_outputs = [_on_host(each) for each in outputs]
        work = self._gloo.allgather(host_outputs, _on_host(inputs), opts)
        return StagedWork([work], _flat(outputs), _flat(host_outputs))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> "StagedWork":
        """torch.distributed.all_gather_into_tensor."""
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> "StagedWork":
        works = []
        parts: list[Tensor] = []
        hosts: list[Tensor] = []
        for output, input in zip(outputs, inputs, strict=True):
            shape = (self.size(), *input.shape)
            output_parts = list(output.view(shape).unbind(0))
            work = self.allgather([output_parts], [input])
            works += work.works
            parts += work.tensors
            hosts += work.hosts
        return StagedWork(works, parts, hosts)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> "StagedWork":
        """All parts are reduced everywhere, and this rank's is kept: gloo's own is no cheaper."""
        reduction = _reduction(opts)
        works = []
        kept = []
        for parts in inputs:
            hosts = _on_host(parts)
            works += [self._gloo.allreduce([host], reduction) for host in hosts]
            kept.append(hosts[self.rank()])
        return StagedWork(works, outputs, kept)

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = None
    ) -> "StagedWork":
        """torch.distributed.reduce_scatter_tensor."""
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> "StagedWork":
        parts = [
            list(input.view(self.size(), *output.shape).unbind(0))
            for output, input in zip(outputs, inputs, strict=True)
        ]
        return self.reduce_scatter(outputs, parts, opts)

    # The names of torch before 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> "StagedWork":
        hosts = _on_host([output])
        (host_input,) = _on_host([input])
        opts = opts or AllToAllOptions()
        work = self._gloo.alltoall_base(
            hosts[0], host_input, output_split_sizes, input_split_sizes, opts
        )
        return StagedWork([work], [output], hosts)

    alltoall_base = all_to_all_single

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> "StagedWork":
        host_outputs = [_on_host(each) for each in outputs]
        work = self._gloo.gather(host_outputs, _on_host(inputs), opts)
        return StagedWork([work], _flat(outputs), _flat(host_outputs))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> "StagedWork":
        hosts = _on_host(outputs)
        work = self._gloo.scatter(hosts, [_on_host(each) for each in inputs], opts)
        return StagedWork([work], outputs, hosts)

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> "StagedWork":
        return StagedWork([self._gloo.send(_on_host(tensors), destination, tag)], [], [])

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> "StagedWork":
        hosts = _on_host(tensors)
        return StagedWork([self._gloo.recv(hosts, source, tag)], tensors, hosts)

    def barrier(self, opts: Any = None) -> "StagedWork":
        return StagedWork([self._gloo.barrier(opts or BarrierOptions())], [], [])


class StagedWork(dist.Work):
    """Collectives on their way; `wait` copies their results to where they belong, once."""

    def __init__(self, works: list[dist.Work], tensors: list[Tensor], hosts: list[Tensor]):
        super().__init__()
        self.works = works
        self.tensors = tensors
        self.hosts = hosts

    def wait(self, timeout: timedelta | None = None) -> bool:
        works, self.works = self.works, []
        for work in works:
            work.wait() if timeout is None else work.wait(timeout)
        for tensor, host in zip(self.tensors, self.hosts, strict=True):
            tensor.detach().copy_(host)
        self.tensors, self.hosts = [], []
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def synchronize(self) -> None:
        self.wait()


def _on_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous copies in the CPU's memory, made when the current stream has computed them."""
    return [
        tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for tensor in tensors
    ]


def _flat(lists: Iterable[list[Tensor]]) -> list[Tensor]:
    return [tensor for each in lists for tensor in each]


def _reduction(opts: Any) -> Any:
    """The options of one all-reduce with the operation of any reduction."""
    found = AllreduceOptions()
    if opts is not None:
        found.reduceOp = opts.reduceOp
    return found
