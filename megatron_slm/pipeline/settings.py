"""The settings of one training run or one scoring of a pipeline, complete and checked."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_slm.checkpoint.architecture import take_architecture
from megatron_slm.config.check import check_config
from megatron_slm.config.code import code_of_the_file_alone, names_code, parts_in_files
from megatron_slm.config.load import ConfigError, from_mapping, merge_file, to_mapping
from megatron_slm.config.schema import Config, DataConfig, DeviceConfig
from megatron_slm.scoring.options import ScoreOptions, option_problems
from megatron_slm.training.scorer_settings import choice_rules

_OF_THE_PIPELINE = {
    "run.folder": "runs write below the pipeline's folder, under their names",
    "data.tokenizer": "the section tokenizer gives it",
    "data.train": "name the corpora in the run's `train`",
    "data.validation": "name the corpora in `validation`",
    "selection.reference.scores": "name the score stores in the run's `scores`",
    "selection.reference.checkpoint": "name the run in the run's `reference`",
    "checkpoint.initialize_from": "name the run or import in the run's `start_from`",
}
_PATHS = {
    "data": ("tokenizer", "index_cache"),
    "checkpoint": ("initialize_from",),
}
_WITHOUT_INFLUENCE = ("monitoring", "parallel")
"""Sections that decide how a run is done and watched, not what it learns."""


def run_config(
    recipe: str,
    layers: Sequence[tuple[str, Mapping]],
    given: Mapping[str, object],
    world_size: int,
) -> tuple[Config | None, list[str]]:
    """The configuration of a run, and what is wrong with it, one sentence each.

    layers: (where it stands, settings) over the recipe, later ones first in rank; given: what the
    pipeline itself sets, by dotted names. None where it cannot be read.
    """
    values: dict = {}
    problems = merge_file(values, recipe) if recipe else []
    problems = [problem.replace("--config", "config") for problem in problems]
    # What the layers name was named on the command line too: pipeline/code.py has seen to that.
    problems += code_of_the_file_alone(values, recipe, {"layers": str(layers)})
    for where, settings in layers:
        given_names = [name for name, _ in _leaves(settings, Config)]
        for name in {each for each in given_names if given_names.count(each) > 1}:
            problems.append(f"{where}.{name}: is given twice, in its section and dotted; keep one")
        for name in given_names:
            if name in _OF_THE_PIPELINE:
                problems.append(f"{where}.{name}: is set by the pipeline; {_OF_THE_PIPELINE[name]}")
        _lay_over(values, settings)
    _lay_over(values, given)
    problems += take_architecture(values)
    config, unreadable = from_mapping(values)
    problems += unreadable
    if problems:
        return None, problems  # and no code that is named was run
    _make_paths_absolute(config)
    try:
        check_config(config, world_size)
    except ConfigError as error:
        problems += error.problems
    try:
        choice_rules(config.selection)
    except ValueError as error:
        problems.append(str(error))
    return config, problems


def _leaves(values: Mapping, cls, where: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every setting in sections and dotted names.

    A mapping that is a value stays whole.
    """
    for key, value in values.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(_hint(cls, name.split("."))):
            yield from _leaves(value, cls, f"{name}.")
        else:
            yield name, value


def _hint(cls, keys: list[str]):
    """The annotation of a dotted setting; None where there is no such setting."""
    for key in keys:
        cls = typing.get_type_hints(cls).get(key) if dataclasses.is_dataclass(cls) else None
    return cls


def _lay_over(values: dict, settings: Mapping, cls=Config) -> None:
    for name, value in _leaves(settings, cls):
        *sections, last = name.split(".")
        inside = values
        for section in sections:
            earlier = inside.get(section)
            inside[section] = dict(earlier) if isinstance(earlier, Mapping) else {}
            inside = inside[section]
        inside[last] = value


def _make_paths_absolute(config: Config) -> None:
    """Jobs start in the checkout, the description was read from wherever it was called."""
    for section, names in _PATHS.items():
        for name in names:
            _make_absolute(getattr(config, section), name)
    config.data.train = [str(Path(prefix).absolute()) for prefix in config.data.train]
    for corpus in config.data.validation:
        _make_absolute(corpus, "corpus")
    if Path(config.selection.scorer.rpartition(":")[0]).is_file():  # FILE.py:NAME
        _make_absolute(config.selection, "scorer")
    for setting, value in parts_in_files(config):
        section, field = setting.split(".")
        several = isinstance(value, list)
        whole = [_absolute_part(each) for each in value] if several else _absolute_part(value)
        setattr(getattr(config, section), field, whole)
    reference = config.selection.reference
    reference.scores = [str(Path(store).absolute()) for store in reference.scores]
    _make_absolute(reference, "checkpoint")


def _absolute_part(name: str) -> str:
    """PATH.py:NAME with its whole path; the name of a package's part as it is."""
    path, _, function = name.rpartition(":")
    return f"{Path(path).absolute()}:{function}" if names_code(name) else name


def _make_absolute(settings, name: str) -> None:
    if getattr(settings, name):
        setattr(settings, name, str(Path(getattr(settings, name)).absolute()))


def what_a_run_learns_from(config: Config) -> dict:
    """The settings that decide the weights: a run of which others change is not made again."""
    values = to_mapping(config)
    for section in _WITHOUT_INFLUENCE:
        del values[section]
    values["run"] = {"seed": config.run.seed}
    values["device"] = {"precision": config.device.precision, "fp8": config.device.fp8}
    values["checkpoint"] = {"initialize_from": config.checkpoint.initialize_from}
    del values["data"]["index_cache"]
    return values


def score_options(
    where: str,
    settings: Mapping,
    checkpoint: str,
    corpus: str,
    output: str,
    reference: Config | None,
    world_size: int,
) -> tuple[ScoreOptions, list[str]]:
    """The options of a scoring, and what is wrong with them.

    reference: the configuration of the run that scores the tokens; None where it is no run of this
    pipeline.
    """
    values: dict = {}
    _lay_over(values, settings, ScoreOptions)
    problems = [
        f"{where}.settings.{name}: is set by the pipeline; leave it out"
        for name in ("checkpoint", "corpus", "output", "tokenizer", "shard")
        if name in values
    ]
    values |= {"checkpoint": checkpoint, "corpus": corpus, "output": output}
    options, unreadable = from_mapping(values, ScoreOptions)
    found = unreadable or [*option_problems(options)]
    if not found and reference is not None:
        found = _layout_problems(options, reference, world_size)
    return options, problems + [f"{where}.settings: {problem}" for problem in found]


def _layout_problems(options: ScoreOptions, reference: Config, world_size: int) -> list[str]:
    """The problems that score will find in this layout, checked before the reference exists."""
    device = dataclasses.asdict(options.device)
    if device["precision"] == "checkpoint":
        device["precision"] = reference.device.precision
    window_tokens = options.window_tokens or reference.data.sequence_length
    config = Config(
        model=dataclasses.replace(reference.model, dropout=0.0, recompute="none"),
        parallel=options.parallel,
        device=DeviceConfig(**device),
        data=DataConfig(sequence_length=window_tokens),
    )
    try:
        check_config(config, world_size, training=False)
    except ConfigError as error:
        return error.problems
    return []
