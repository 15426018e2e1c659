"""Learning rate of every step: linear warm-up, then constant, linear, cosine or
warm-up-stable-decay.
"""

import math

from megatron_slm.config.schema import Config


def learning_rate(config: Config, position: float, end: float) -> float:
    """Learning rate of the update with which a run of `end` steps has done `position`: a pure
    function, resuming needs no state.

    Both may be fractions, where steps had another size before (run_length.py). Warm-up rises
    linearly over warmup_fraction of the run and reaches the peak at its end; the shape then runs
    from the peak to min_learning_rate at the last step (wsd: only over the last decay_fraction of
    the run).
    """
    schedule, optimizer = config.schedule, config.optimizer
    warmup_steps = math.ceil(schedule.warmup_fraction * end)
    if position <= warmup_steps:
        return optimizer.learning_rate * position / warmup_steps
    begin = (
        warmup_steps
        if schedule.style != "wsd"
        else max(warmup_steps, end - math.ceil(schedule.decay_fraction * end))
    )
    if schedule.style == "constant" or position <= begin:
        return optimizer.learning_rate
    done = (position - begin) / (end - begin) if position < end else 1.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.style == "cosine" else 1.0 - done
    return (
        optimizer.min_learning_rate + (optimizer.learning_rate - optimizer.min_learning_rate) * left
    )
