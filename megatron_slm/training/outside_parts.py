"""The parts of a run that its settings take from outside the library, loaded and tried.

Loading runs the Python files that the settings name, so only `train` does it, after config/code.py
has seen that the command line names them too. Nothing here imports torch; the optimizer is tried in
model/outside_optimizer.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_slm.config.extension_points import load_part, named_parts
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config
from megatron_slm.training.learning_rate import Shape, problem_of_shape_value

Part = Callable[..., Any]
TRIED_POSITIONS = (11.0, 500.0, 1000.0)
"""Positions at which a shape is tried, in a schedule of 1000 steps with 10 of warm-up."""


@dataclass(frozen=True)
class OutsideParts:
    """What the settings take from outside the library; None or empty where they name none."""

    make_optimizer: Part | None = None
    """optimizer.kind: (parameter groups, settings) -> torch optimizer."""
    schedule_shape: Shape | None = None
    """schedule.style: (position, warm-up steps, end) -> part of the peak learning rate."""
    sinks: Mapping[str, Part] = field(default_factory=dict)
    """monitoring.sinks: (run folder, settings) -> sink."""
    validations: Mapping[str, Part] = field(default_factory=dict)
    """monitoring.validations: (ValidationRun) -> metrics."""
    after_step: Part | None = None
    """monitoring.after_step: (step, metrics)."""


def load_outside_parts(config: Config) -> OutsideParts:
    """Load every part that the settings name. ConfigError lists what is wrong with each of them."""
    loaded: dict[str, dict[str, Part]] = {}
    problems = []
    for point, name in named_parts(config):
        try:
            loaded.setdefault(point.setting, {})[name] = load_part(point, name)
        except ValueError as error:
            problems.append(str(error))
    shape = _only(loaded, "schedule.style")
    if shape is not None:
        problems += _problems_of_shape(shape, config.schedule.style)
    if problems:
        raise ConfigError(problems)
    return OutsideParts(
        make_optimizer=_only(loaded, "optimizer.kind"),
        schedule_shape=shape,
        sinks=loaded.get("monitoring.sinks", {}),
        validations=loaded.get("monitoring.validations", {}),
        after_step=_only(loaded, "monitoring.after_step"),
    )


def _only(loaded: Mapping[str, Mapping[str, Part]], setting: str) -> Part | None:
    return next(iter(loaded.get(setting, {}).values()), None)


def _problems_of_shape(shape: Shape, name: str) -> list[str]:
    """What is wrong with the values that a learning-rate shape has."""
    for position in TRIED_POSITIONS:
        try:
            value = shape(position, 10, 1000.0)
        except Exception as error:  # the user's code: it may raise anything
            return [f"schedule.style: {name} fails at step {position:g} of 1000: {error!r}"]
        if problem := problem_of_shape_value(value):
            return [f"schedule.style: {name} {problem} at step {position:g} of 1000"]
    return []
