"""Asking a run to stop: by signal, or by a file, agreed on by all ranks at the end of a step.

srun and mpirun swallow or repeat signals, and torchrun kills its workers 30 seconds after it passed one on, so a batch
system's warning is best passed on as a file: whoever writes `stop_requested` into the run folder makes the run save a
checkpoint and leave with exit code 85 ("run me again"). A run that is asked to stop and cannot save leaves with 4, as one
does that cannot save at its end.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_slm.training.data_fault import DataFault, share_fault
from megatron_slm.training.stop_signals import STOP_FILE, StopSignals

EXIT_RESUME = 85
"""Exit code of a run that saved a checkpoint and wants to be started again."""
_CANNOT_READ = 2
"""What a rank answers that cannot read the next step, above 1 (asked to stop) and 0."""


class StopRequest:
    """Becomes true on every rank at the same step, once any rank was asked by a signal or the stop file exists.

    signals: what this process hears; None = it listens to the file alone.
    """

    def __init__(
        self, run_folder: str | Path, device: torch.device, signals: StopSignals | None = None
    ):
        self.file = Path(run_folder) / STOP_FILE
        self.device = device
        self.signals = signals
        self.fault: DataFault | None = None
        """What keeps some rank from reading the next step, the same on every rank."""

    def agreed(self, fault: Exception | None = None) -> bool:
        """Whether to stop after this step; one 4-byte all-reduce over the world.

        Only rank 0 looks at the file. fault: why this rank cannot read the next step. Where any
        rank has one, all stop, and `self.fault` says it.
        """
        signalled = self.signals is not None and bool(self.signals.asked)
        asked = signalled or (dist.get_rank() == 0 and self.file.exists())
        answer = _CANNOT_READ if fault is not None else int(asked)
        flag = torch.tensor(answer, dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() == _CANNOT_READ:
            self.fault = share_fault(fault)
        return bool(flag.item())

    def clear(self) -> str:
        """Remove the stop file, so that the restarted run does not stop at once.

        On rank 0, returns why it could not be removed; "" = done.
        """
        if dist.get_rank() == 0:
            try:
                self.file.unlink(missing_ok=True)
            except (
                OSError
            ) as error:  # a folder that became read-only, which is also why nothing was saved
                return f"{self.file} could not be removed ({error}); remove it, or the next start stops after one step"
        return ""
