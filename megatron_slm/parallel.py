"""Join and leave the job: torch.distributed, megatron-core's groups, and `Groups` around them.

Everything else is handed the frozen `Groups` as an argument.
"""

import datetime
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_slm.config.schema import ParallelConfig
from megatron_slm.device import Device


@dataclass(frozen=True)
class Groups:
    """This process's position in the parallel layout, and its process groups.

    tp: tensor (also sequence) parallel; pp: pipeline; dp: data; cp: context; dp_cp: data x context,
    the ranks whose gradients are summed and, on the last pipeline stage, whose tokens compete
    (docs/method.md#point-9). ep: expert parallel, ranks of dp_cp (and tp, with expert_tensor below
    tensor) that hold different experts of the same layers.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    virtual_chunks: int
    device: torch.device

    tp_rank = property(lambda self: self.tp.rank())
    tp_size = property(lambda self: self.tp.size())
    pp_rank = property(lambda self: self.pp.rank())
    pp_size = property(lambda self: self.pp.size())
    dp_rank = property(lambda self: self.dp.rank())
    dp_size = property(lambda self: self.dp.size())
    cp_rank = property(lambda self: self.cp.rank())
    cp_size = property(lambda self: self.cp.size())
    ep_size = property(lambda self: self.ep.size())
    world_rank = property(lambda self: dist.get_rank())
    world_size = property(lambda self: dist.get_world_size())
    is_last_stage = property(lambda self: self.pp.rank() == self.pp.size() - 1)
    is_logger = property(lambda self: dist.get_rank() == dist.get_world_size() - 1)
    """The last rank of the world is always in the last pipeline stage, where the losses are.

    Rank 0 has none with pipeline parallelism, and would log a placeholder in their place.
    """


def join_job(
    parallel: ParallelConfig,
    device: Device,
    seed: int,
    *,
    timeout_minutes: int = 30,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Groups:
    """Join the job and build megatron-core's groups.

    The job is that of torchrun's or srun's environment, or of an explicit store. torch.distributed
    comes first, then megatron-core's groups, then seeds: megatron-core needs each before the next.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    if store is None and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()  # a single process that was started without torchrun
    dist.init_process_group(
        device.backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        # NCCL then connects at once; of other backends it asks what they have not.
        device_id=device.torch_device if device.backend == "nccl" else None,
    )

    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor or None,
        distributed_timeout_minutes=timeout_minutes,
    )
    groups = Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        virtual_chunks=parallel.virtual_pipeline,
        device=device.torch_device,
    )
    seed_everything(seed, groups)
    return groups


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed Python, numpy, torch and megatron-core's trackers.

    Pipeline stages get different seeds, data-parallel ranks the same one.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * groups.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def leave_job() -> None:
    """Leave the job: destroy megatron-core's groups and torch.distributed's."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
