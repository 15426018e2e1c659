"""The device a process computes on: a CUDA GPU with NCCL, or this machine's CPU with gloo.

Call `choose_device(kind)` once per process, before anything imports megatron.core. On a machine
without CUDA it puts the CPU stand-ins in place (cpu_standins.py).
"""

import os
import sys
import warnings
from dataclasses import dataclass

import torch

from megatron_slm.core_versions import core_problem, drop_notices
from megatron_slm.cpu_standins import cpu_answers_for_cuda, use_cpu
from megatron_slm.shared_gpu import (
    STAGED_GLOO,
    SWITCH,
    register_staged_gloo,
    shared_gpu,
    sharing_is_requested,
)


@dataclass(frozen=True)
class Device:
    """What this process computes on: a torch device, and the backend of torch.distributed."""

    kind: str
    torch_device: torch.device
    backend: str


def choose_device(kind: str = "auto") -> Device:
    """Take the device for this process: "auto", "cpu" or "cuda".

    Raises ValueError when CUDA is requested and absent, or the installed megatron-core is not one
    that this library runs on. On CUDA the GPU is LOCAL_RANK's; torch.cuda.set_device is called
    here, so that NCCL and megatron-core use it. More processes than GPUs are refused, but for the
    developer's switch of shared_gpu.py.
    """
    _quiet_megatron()
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device.kind is {kind!r}; it can be auto, cpu or cuda")
    if problem := core_problem():
        raise ValueError(problem)
    has_cuda = torch.cuda.is_available() and not cpu_answers_for_cuda()
    if kind == "cuda" and not has_cuda:
        raise ValueError(
            "device.kind is cuda, but torch sees no CUDA device here; use auto or cpu, or check "
            f"the driver and the torch build (torch {torch.__version__})"
        )
    if sharing_is_requested():
        index = shared_gpu(torch.cuda.device_count() if has_cuda and kind != "cpu" else 0)
        register_staged_gloo()
        torch.cuda.set_device(index)
        return Device("cuda", torch.device("cuda", index), STAGED_GLOO)
    if has_cuda and kind != "cpu":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} "
                f"GPUs; start at most one process per GPU (for tests alone there is {SWITCH}: "
                "CONTRIBUTING.md)"
            )
        torch.cuda.set_device(local_rank)
        return Device("cuda", torch.device("cuda", local_rank), "nccl")
    use_cpu()
    return Device("cpu", torch.device("cpu"), "gloo")


def set_threads(threads_per_process: int = 0) -> int:
    """Set the CPU threads of this process and return their number.

    0 shares this machine's cores between its processes. More threads than cores is worse than
    slow: OpenMP's waiting threads spin.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = threads_per_process or max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(threads)
    return threads


def _quiet_megatron() -> None:
    """Drop the warnings of megatron-core's import, dozens of lines in every process, and its
    notices.

    The start table shows once what they contain about missing accelerations. megatron-core's own
    `import wandb` is refused, because nothing here uses it: it takes time, and it makes temporary
    folders that stay after a kill (monitoring/wandb_loading.py).
    """
    drop_notices()
    if "wandb" not in sys.modules:
        # None makes an import fail, by the language reference; typeshed allows modules only.
        sys.modules["wandb"] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed"
    )
