"""Rules between fields, as sentences: what was got, what is expected, what to change.

Pure: no file is opened and nothing is started.
"""

from collections.abc import Callable, Iterator

from megatron_slm.config import (
    layer_engine,
    layout_rules,
    part_rules,
    tool_rules,
    training_rules,
)
from megatron_slm.config.load import ConfigError
from megatron_slm.config.ranges import out_of_range
from megatron_slm.config.schema import Config

Rule = Callable[[Config, int], Iterator[str]]
"""Takes a configuration and the number of processes; yields one sentence per broken rule."""
LAYOUT_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (layout_rules.model_problems, ("model", "parallel")),
    (part_rules.part_problems, ("model", "data")),
    (layout_rules.parallel_problems, ("model", "parallel", "data")),
    (layout_rules.head_engine_problems, ("model",)),
    (layout_rules.fp8_problems, ("model", "parallel", "data")),
    (layer_engine.layer_engine_problems, ()),
)
"""Each rule with the sections whose numbers it reads."""
TRAINING_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (training_rules.data_problems, ()),
    (training_rules.batch_problems, ("data", "parallel")),
    (training_rules.selection_problems, ()),
    (training_rules.schedule_problems, ()),
    (training_rules.optimizer_problems, ("optimizer",)),
    (training_rules.checkpoint_problems, ()),
    (tool_rules.tool_problems, ("monitoring",)),
)


def check_config(config: Config, world_size: int, *, training: bool = True) -> None:
    """Raise ConfigError with every number out of range and every broken rule between settings.

    `world_size` is the number of processes of the job.
    """
    numbers_out_of_range = dict(out_of_range(config))
    wrong_sections = {name.split(".")[0] for name in numbers_out_of_range}
    problems = list(numbers_out_of_range.values())
    for rule, sections in (*LAYOUT_RULES, *(TRAINING_RULES if training else ())):
        # A rule divides by sizes, so it runs only if the numbers of its sections are in range.
        if not wrong_sections.intersection(sections):
            problems += rule(config, world_size)
    if problems:
        raise ConfigError(problems)
