"""Learning rate of every step: linear warm-up, then a shape (constant, linear, cosine,
warm-up-stable-decay, or one from outside).
"""

import math
from collections.abc import Callable

from megatron_slm.config.schema import Config

Shape = Callable[[float, int, float], float]
"""(position, warm-up steps, end), all in steps -> the part of the peak learning rate, above
min_learning_rate, that the update at `position` has. Called for positions after warm-up only."""


def learning_rate(
    config: Config, position: float, end: float, outside_shape: Shape | None = None
) -> float:
    """Learning rate of the update with which a run of `end` steps has done `position`.

    A pure function: resuming needs no state. Both may be fractions, where steps had another size
    before (run_length.py). Warm-up rises linearly over warmup_fraction of the run and reaches the
    peak at its end; the shape then runs from the peak to min_learning_rate at the last step (wsd:
    only over the last decay_fraction of the run). outside_shape: that of a schedule.style which is
    not built in; ValueError where it gives no finite number from 0 up, before any weight has it.
    """
    schedule = config.schedule
    optimizer = config.optimizer
    warmup_steps = math.ceil(schedule.warmup_fraction * end)
    if position <= warmup_steps:
        return optimizer.learning_rate * position / warmup_steps
    if outside_shape is not None:
        left = outside_shape(position, warmup_steps, end)
        if problem := problem_of_shape_value(left):
            raise ValueError(f"schedule.style: {schedule.style} {problem} at step {position:g}")
    elif schedule.style == "wsd":
        decay_begin = max(warmup_steps, end - math.ceil(schedule.decay_fraction * end))
        left = _linear(position, decay_begin, end)
    else:
        left = _SHAPES[schedule.style](position, warmup_steps, end)
    if left == 1.0:
        return optimizer.learning_rate
    return (
        optimizer.min_learning_rate + (optimizer.learning_rate - optimizer.min_learning_rate) * left
    )


def problem_of_shape_value(value: object) -> str:
    """What is wrong with the value of a shape from outside; "" = nothing."""
    if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
        return ""
    return f"gives {value!r}, not a number from 0 up, the part of the peak learning rate,"


def _done(position: float, begin: float, end: float) -> float:
    """How far the run is between `begin` and `end`, 0 to 1."""
    if position <= begin:
        return 0.0
    return (position - begin) / (end - begin) if position < end else 1.0


def _constant(position: float, begin: float, end: float) -> float:
    return 1.0


def _linear(position: float, begin: float, end: float) -> float:
    return 1.0 - _done(position, begin, end)


def _cosine(position: float, begin: float, end: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * _done(position, begin, end)))


_SHAPES = {"constant": _constant, "linear": _linear, "cosine": _cosine}
