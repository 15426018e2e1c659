"""The random states of a rank. During training only dropout draws from them; a run that resumes in
the same layout restores them exactly.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_slm.checkpoint.plain_reader import RANDOM_KEY
from megatron_slm.parallel import Groups


def layout_of(groups: Groups) -> dict[str, int]:
    """The parallel sizes as plain numbers."""
    return {
        "tensor": groups.tp_size,
        "pipeline": groups.pp_size,
        "virtual_pipeline": groups.virtual_chunks,
        "context": groups.cp_size,
        "data": groups.dp_size,
    }


def random_state(groups: Groups) -> ShardedObject:
    """This rank's random states, as an entry of a sharded state dict."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        RANDOM_KEY,
        state,
        (groups.pp_size, groups.tp_size, groups.dp_cp.size()),
        (groups.pp_rank, groups.tp_rank, groups.dp_cp.rank()),
        replica_id=0,
    )


def restore_random_state(state: dict[str, Any], checkpoint: Path) -> None:
    """Continue with the stored random states.

    ValueError when they are not valid; each library checks its state and raises its own errors.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["tracker"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint}: its random states cannot be taken up ({type(error).__name__}: "
            f"{error}); use another checkpoint"
        ) from error
