"""The attributes of a run that other modules of this package use. loop.TrainingRun has all of them.

Modules that write a checkpoint or examine a bad step import this protocol instead of it, so that
there is no import cycle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_slm.checkpoint.store import CheckpointStore
    from megatron_slm.config.schema import Config
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.data.position import DataPosition
    from megatron_slm.monitoring import LossSpikes, Metrics
    from megatron_slm.parallel import Groups
    from megatron_slm.training.busy_time import SlowRankReport
    from megatron_slm.training.outside_parts import OutsideParts
    from megatron_slm.training.probe import Probe
    from megatron_slm.training.rank_batches import ValidationOnThisRank
    from megatron_slm.training.reporter import Reporter
    from megatron_slm.training.resume import Fingerprints
    from megatron_slm.training.run_length import Done, RunLength
    from megatron_slm.training.setup import RunInputs
    from megatron_slm.training.spike_data import SpikeData
    from megatron_slm.training.tools import TrainingTools
    from megatron_slm.training.trainer import Trainer
    from megatron_slm.training.watchdog import Watchdog


class RunParts(Protocol):
    """One run folder being trained, as it stands between two steps."""

    config: Config
    groups: Groups
    run_inputs: RunInputs
    parts: OutsideParts
    folder: Path
    trainer: Trainer
    validation: dict[str, ValidationOnThisRank]
    loader: TrainingLoader
    store: CheckpointStore
    reporter: Reporter
    metrics: Metrics
    probe: Probe
    loss_spikes: LossSpikes
    slow_ranks: SlowRankReport
    spike_data: SpikeData
    watchdog: Watchdog
    tools: TrainingTools
    done: Done
    length: RunLength
    steps: int
    """Number of the last step."""
    position: DataPosition
    """How much of each corpus was read before this start."""
    fingerprints: Fingerprints
    """Fingerprints of everything that is read."""
    validated: tuple[int, dict[str, float]]
    """Step of the last validation, and the loss of each corpus; known on last-stage ranks."""
    tokens_selected: int
    """Tokens selected up to the last log line; known on last-stage ranks."""
    skipped_steps: int
    wandb_id: str

    @property
    def step(self) -> int:
        """Finished steps."""
