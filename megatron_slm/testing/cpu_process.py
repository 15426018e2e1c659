"""Imported once by the server that forks test processes (spawn.py).

Importing it loads torch and megatron-core on the CPU, and starts nothing.
"""

import torch

from megatron_slm.device import choose_device

torch.set_num_threads(1)  # a pool of threads would not survive the fork
choose_device("cpu")

import megatron_slm.checkpoint.store  # noqa: E402
import megatron_slm.model.build  # noqa: E402
import megatron_slm.model.optimizer  # noqa: E402
import megatron_slm.training.step  # noqa: E402, F401
