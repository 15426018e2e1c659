"""Compares a configuration with the checkpoint that its weights come from, or fills it from one.

Both happen before anything is started, and without torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    complete_checkpoints,
    read_checkpoint_info,
)
from megatron_slm.config.architecture import (
    ARCHITECTURE,
    ROPE_FOR_LONGER_SEQUENCES,
    Difference,
    architecture_differences,
    written,
)
from megatron_slm.config.load import from_mapping
from megatron_slm.config.schema import Config
from megatron_slm.tokenization import Tokenizer, tokenizer_differences


@dataclass(frozen=True)
class _Origin:
    """A checkpoint that determines the architecture of this run's weights."""

    name: str
    """How a sentence names it."""
    info: CheckpointInfo
    otherwise: str = ""
    """What can be done instead of changing a setting."""
    has_weights: bool = True
    """Whether weights are taken too: they belong to a tokenizer."""
    is_start: bool = True
    """Whether the run only starts from it: checkpoint.allow_other_rope is about a start."""


def take_architecture(values: dict) -> list[str]:
    """Fill the section `model` of the given settings from what model.from_checkpoint names.

    For config.load.parse_config. Returns the architecture settings that were given as well and
    differ, one sentence each, or why the checkpoint cannot be read.
    """
    given = values.get("model")
    if not isinstance(given, Mapping):
        return []
    path = given.get("from_checkpoint")
    if not isinstance(path, str) or not path:
        return []
    sections = {name: values.get(name) for name in ("run", "checkpoint")}
    others, _ = from_mapping({name: value for name, value in sections.items() if value is not None})
    try:
        theirs = _architecture_source(path, others.run.folder).model_config()
    except ValueError as error:
        return [f"model.from_checkpoint: {error}"]
    # 0 means the tokenizer's size, not known yet; it is compared when the tokenizer is opened.
    chosen = {name for name in ARCHITECTURE if name in given}
    if not given.get("vocabulary_size"):
        chosen.discard("vocabulary_size")
    taken = {name: getattr(theirs, name) for name in ARCHITECTURE if name not in chosen}
    values["model"] = {**given, **taken}
    config, unreadable = from_mapping({"model": values["model"]})
    bad_fields = {problem.partition(":")[0] for problem in unreadable}
    return [
        f"model.{difference.field}: got {written(difference.configuration)}, but "
        f"model.from_checkpoint ({path}) has {written(difference.checkpoint)}; leave one of the "
        "two settings out"
        for difference in architecture_differences(theirs, config.model)
        if difference.field in chosen - _allowed(others)
        and f"model.{difference.field}" not in bad_fields
    ]


def differing_settings(
    config: Config, vocabulary_size: int, tokenizer: Tokenizer | None, *, resumable: bool = True
) -> list[str]:
    """What differs from the checkpoint that this run's weights come from, one sentence each.

    That is the newest of its own (unless `resumable` is off), else checkpoint.initialize_from.
    `vocabulary_size` is the run's true one; 0, like None for `tokenizer`, where it is not known.
    ValueError: a checkpoint cannot be read.
    """
    problems = []
    for origin in _origins(config, _own_checkpoint(config.run.folder) if resumable else None):
        try:
            theirs = origin.info.model_config()
        except ValueError as error:
            raise ValueError(f"{origin.name}: {error}") from error
        ours = replace(config.model, vocabulary_size=vocabulary_size or theirs.vocabulary_size)
        problems += [
            f"{origin.name} has model.{difference.field} {written(difference.checkpoint)}, "
            f"this configuration {_ours(difference, config)}; "
            f"{_remedy(difference, tokenizer, origin.is_start)}{origin.otherwise}"
            for difference in architecture_differences(theirs, ours)
            if not (origin.is_start and difference.field in _allowed(config))
        ]
        if origin.has_weights and tokenizer is not None:
            problems += _tokenizer_problems(origin, tokenizer)
    return problems


def allowed_differences(config: Config) -> list[str]:
    """What checkpoint.allow_other_rope lets differ where a run starts, one phrase each."""
    start = config.checkpoint.initialize_from
    if not start or not _allowed(config) or _own_checkpoint(config.run.folder) is not None:
        return []
    theirs = read_checkpoint_info(start).model_config()
    return [
        f"model.{difference.field} {written(difference.configuration)}, in {start} "
        f"{written(difference.checkpoint)}"
        for difference in architecture_differences(theirs, config.model)
        if difference.field in _allowed(config)
    ]


def _allowed(config: Config) -> frozenset[str]:
    allowed = config.checkpoint.allow_other_rope
    return frozenset(ROPE_FOR_LONGER_SEQUENCES) if allowed else frozenset()


def _origins(config: Config, own: CheckpointInfo | None) -> Iterator[_Origin]:
    """The checkpoints that bind this configuration. ValueError names one that cannot be read."""
    start = config.checkpoint.initialize_from
    architecture = config.model.from_checkpoint
    if own is not None:
        yield _Origin(
            f"the checkpoint that run.folder {config.run.folder} resumes from",
            own,
            otherwise=", or give another run.folder",
            is_start=False,
        )
    elif start:
        try:
            info = read_checkpoint_info(start)
        except ValueError as error:
            raise ValueError(f"checkpoint.initialize_from: {error}") from error
        yield _Origin(
            f"checkpoint.initialize_from {start}",
            info,
            otherwise=f", or take all of its architecture: model.from_checkpoint: {start}",
        )
    if architecture:
        try:
            info = _architecture_source(architecture, config.run.folder)
        except ValueError as error:
            raise ValueError(f"model.from_checkpoint: {error}") from error
        yield _Origin(f"model.from_checkpoint {architecture}", info, has_weights=False)


def _architecture_source(path: str, run_folder: str) -> CheckpointInfo:
    """model.json of `path`, or of the run's own checkpoint where `path` is gone.

    So a run can be resumed without the checkpoint that it started from. ValueError: there is
    neither.
    """
    if not Path(path).exists():
        saved = _own_checkpoint(run_folder)
        if saved is not None:
            return saved
    return read_checkpoint_info(path)


def _own_checkpoint(run_folder: str) -> CheckpointInfo | None:
    """model.json of a run's newest checkpoint; damaged ones are passed over, as resuming does."""
    for folder in reversed(complete_checkpoints(Path(run_folder, "checkpoints"))):
        try:
            return read_checkpoint_info(folder)
        except ValueError:
            continue
    return None


def _ours(difference: Difference, config: Config) -> str:
    counted = difference.field == "vocabulary_size" and not config.model.vocabulary_size
    return written(difference.configuration) + (" (the tokenizer has so many)" if counted else "")


def _remedy(difference: Difference, tokenizer: Tokenizer | None, is_start: bool) -> str:
    if difference.field == "vocabulary_size" and tokenizer is not None:
        ids = tokenizer.vocabulary_size
        if difference.checkpoint < ids:
            return f"{tokenizer.path} has {ids} ids: use the tokenizer of the checkpoint"
    remedy = f"set model.{difference.field} to {written(difference.checkpoint)}"
    if is_start and difference.field in ROPE_FOR_LONGER_SEQUENCES:
        remedy += " (on purpose: checkpoint.allow_other_rope)"
    return remedy


def _tokenizer_problems(origin: _Origin, tokenizer: Tokenizer) -> list[str]:
    theirs = origin.info.tokenizer
    differences = tokenizer_differences({"fingerprint": "unknown", **theirs}, tokenizer.entry)
    if not differences:
        return []
    return [
        f"{origin.name} was trained with the tokenizer {theirs.get('path')}, data.tokenizer is "
        f"{tokenizer.path}: {'; '.join(differences)}: the same ids mean other text; use the "
        "checkpoint's tokenizer and corpora made with it"
    ]
