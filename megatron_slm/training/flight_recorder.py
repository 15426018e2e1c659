"""NCCL's flight recorder: the last collectives of every group, for a run that hangs.

torch reads the environment when it makes a process group, so this comes before parallel.join_job.
The watchdog writes the record of each rank when a run hangs (watchdog.py), and NCCL itself when a
collective times out. Read them with `torchfrtrace`, which is installed with torch. Not yet run on
GPUs.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

from megatron_slm.training.watchdog import HANG_FOLDER

TRACE_PREFIX = "nccl_timeout_rank_"
"""torch appends the rank."""


def record_collectives(
    entries: int, run_folder: str | Path, environment: MutableMapping[str, str] | None = None
) -> None:
    """Let NCCL remember `entries` collectives (0 = none) and write them into RUN/ranks.

    Variables that the environment sets already are left as they are. Each variable is set under its
    old and its new name: torch 2.13 reads TORCH_FR_*, and still accepts the old ones.
    """
    environment = os.environ if environment is None else environment
    prefix = str(Path(run_folder).absolute() / HANG_FOLDER / TRACE_PREFIX)
    if entries:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            environment.setdefault(name, prefix)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        environment.setdefault(name, str(entries))
