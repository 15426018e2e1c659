"""Learning rate of every step: linear warm-up, then constant, linear, cosine or warm-up-stable-decay."""

import math

from megatron_slm.config.check import train_steps
from megatron_slm.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the update that ends step `step` (1-based), a pure function: resuming needs no schedule state.

    Warm-up rises linearly over warmup_fraction of the run and reaches the peak at its end; the shape then runs from the
    peak to min_learning_rate at the last step (wsd: only over the last decay_fraction of the run).
    """
    steps, schedule, optimizer = train_steps(config), config.schedule, config.optimizer
    warmup_steps = math.ceil(schedule.warmup_fraction * steps)
    if step <= warmup_steps:
        return optimizer.learning_rate * step / warmup_steps
    begin = (
        warmup_steps
        if schedule.style != "wsd"
        else max(warmup_steps, steps - math.ceil(schedule.decay_fraction * steps))
    )
    if schedule.style == "constant" or step <= begin:
        return optimizer.learning_rate
    done = min(1.0, (step - begin) / max(1, steps - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.style == "cosine" else 1.0 - done
    return (
        optimizer.min_learning_rate + (optimizer.learning_rate - optimizer.min_learning_rate) * left
    )
