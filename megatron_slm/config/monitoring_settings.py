"""The settings of the section `monitoring`: what a run writes beside its checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.config.ranges import Count, Size


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto = online when an API key is set, else offline; the key itself never belongs in a config.
    """
    project: str = "megatron-slm"
    """W&B project."""
    entity: str = ""
    """W&B entity (team); empty = the account's default."""
    group: str = ""
    """W&B group, to compare arms of one experiment."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""


@dataclass
class MonitoringConfig:
    """What is written, how often."""

    log_interval_steps: Size = 10
    """Steps between two lines of metrics."""
    validation_interval_steps: Count = 0
    """Steps between two validations; 0 = only at the end."""
    hang_seconds: Count = 300
    """A run that finishes no step for so long (and three times its longest step) writes every
    rank's stacks into the run folder and ends with exit code 86; 0 = never. The first step,
    validation and checkpoints may take device.timeout_minutes."""
    validation_batches: Count = 8
    """Global batches per validation corpus; 0 = the whole corpus."""
    validations: list[str] = field(default_factory=list)
    """Measurements beside the plain loss, made at every validation: names that installed packages
    offer, or PATH.py:NAME, a function in a file of your own: see docs/extending.md."""
    sinks: list[str] = field(default_factory=list)
    """Where metrics go beside the console, metrics.jsonl and W&B: names that installed packages
    offer, or PATH.py:NAME, a function in a file of your own: see docs/extending.md."""
    after_step: str = ""
    """A function that every rank calls after each step with the step and its metrics: PATH.py:NAME,
    or a name that an installed package offers; empty = none. See docs/extending.md."""
    profile_steps: list[Size] = field(default_factory=list)
    """First and last step that torch's profiler records, such as [20, 22]; every rank's trace goes
    to RUN/profile/. Empty = none. It slows these steps down."""
    memory_snapshot: bool = False
    """Record every allocation of CUDA memory, and write RUN/memory_snapshot*.pickle when memory
    runs out. CUDA only."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
