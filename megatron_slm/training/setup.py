"""Everything a run reads, opened and checked before torch is imported and processes join."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.architecture import differing_settings
from megatron_slm.checkpoint.folder import read_checkpoint_info
from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config
from megatron_slm.data.corpora import (
    Corpus,
    UnusableData,
    nothing_counts,
    open_corpora,
    too_few_tokens,
)
from megatron_slm.data.score_manifest import presented_name
from megatron_slm.selection.rules import ChoiceRules
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences
from megatron_slm.training import resume
from megatron_slm.training.reference import reference_config
from megatron_slm.training.scorer_settings import choice_rules


class RunInputError(ConfigError):
    """A configured input cannot be used: missing, damaged, or of another tokenizer."""


@dataclass(frozen=True)
class RunInputs:
    """Checked inputs of a run."""

    tokenizer: Tokenizer
    corpora: list[Corpus]
    validation: dict[str, Corpus]
    vocabulary_size: int

    @property
    def every_corpus(self) -> list[Corpus]:
        """Those that are trained on, then those of validation."""
        return [*self.corpora, *self.validation.values()]


def open_run_inputs(config: Config, world_size: int = 1) -> RunInputs:
    """Open scorer, tokenizer, corpora, score stores and what the run starts from.

    ConfigError (a bad selection among them) or RunInputError lists every problem in one go.
    world_size: that of the job, for the layout of an online reference.
    """
    rules, bad_settings = _choice_rules(config)
    tokenizer, problems = _open_tokenizer(config)
    entry = tokenizer.entry if tokenizer else None
    corpora, of_corpora = _open_training_corpora(config, entry)
    problems += of_corpora
    validation, of_corpora = _open_validation_corpora(config, entry)
    problems += of_corpora
    smallest = tokenizer.vocabulary_size if tokenizer else 0
    size = config.model.vocabulary_size or smallest
    if size < smallest:
        problems.append(
            f"model.vocabulary_size: got {size}, below the tokenizer's {smallest}; raise it, or "
            "set it to 0"
        )
    if rules is not None:
        problems += _missing_columns(config, rules, corpora)
    try:
        bad_settings += differing_settings(config, size, tokenizer)
    except ValueError as error:
        problems.append(str(error))
    problems += _online_reference(config, world_size, entry)
    if bad_settings:
        raise ConfigError(bad_settings + problems)
    if problems or tokenizer is None:
        raise RunInputError(problems)
    run_inputs = RunInputs(tokenizer, corpora, validation, size)
    if (saved := resume.newest_saved(config.run.folder)) is not None:
        check_resume(config, run_inputs, saved)
    return run_inputs


def _choice_rules(config: Config) -> tuple[ChoiceRules | None, list[str]]:
    """The rules of the configured selection, or what is wrong with its settings."""
    try:
        return choice_rules(config.selection), []
    except ValueError as error:
        return None, [str(error)]


def _open_tokenizer(config: Config) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer, or why it cannot be loaded."""
    try:
        return load_tokenizer(config.data.tokenizer), []
    except (ValueError, OSError) as error:
        return None, [f"data.tokenizer: {error}"]


def _open_training_corpora(
    config: Config, tokenizer: Mapping[str, Any] | None
) -> tuple[list[Corpus], list[str]]:
    """The training corpora with their scores, and what is wrong with them."""
    reference = config.selection.reference
    try:
        corpora = open_corpora(
            config.data.train,
            reference.scores,
            tokenizer=tokenizer,
            allow_missing_scores=reference.allow_missing_scores,
        )
    except UnusableData as error:
        problems = [f"data.train: {problem}" for problem in error.corpora]
        problems += [f"selection.reference.scores: {problem}" for problem in error.scores]
        return [], problems
    length = config.data.sequence_length
    unusable = [too_few_tokens(corpus, length) or nothing_counts(corpus) for corpus in corpora]
    return corpora, [f"data.train: {problem}" for problem in unusable if problem]


def _open_validation_corpora(
    config: Config, tokenizer: Mapping[str, Any] | None
) -> tuple[dict[str, Corpus], list[str]]:
    """The validation corpora by their names, and what is wrong with them."""
    corpora: dict[str, Corpus] = {}
    problems = []
    for held_out in config.data.validation:
        try:
            [corpus] = open_corpora([held_out.corpus], tokenizer=tokenizer)
        except UnusableData as error:
            unusable = error.corpora
        else:
            corpora[held_out.name] = corpus
            unusable = [problem] if (problem := nothing_counts(corpus)) else []
        problems += [f"data.validation {held_out.name}: {reason}" for reason in unusable]
    return corpora, problems


def check_resume(config: Config, run_inputs: RunInputs, saved: resume.Saved) -> None:
    """Whether the run can go on from `saved` with these settings and inputs.

    ConfigError or RunInputError, with every problem, when it cannot.
    """
    fingerprints = resume.fingerprints_of(config, run_inputs.corpora, run_inputs.validation)
    wanted = resume.wanted_position(config, run_inputs.corpora)
    bad_settings = resume.bad_settings(saved, config)
    problems = resume.bad_data(saved, wanted, fingerprints)
    if bad_settings:
        raise ConfigError(bad_settings + problems)
    if problems:
        raise RunInputError(problems)


def _online_reference(
    config: Config, world_size: int, tokenizer: Mapping[str, Any] | None
) -> list[str]:
    """What is wrong with the online reference, seen before any process waits for another."""
    reference = config.selection.reference.checkpoint
    if not reference:
        return []
    setting = f"selection.reference.checkpoint {reference}"
    problems = []
    try:
        info = read_checkpoint_info(reference)
        trained_with = {"fingerprint": "unknown", **info.tokenizer}
        if differences := tokenizer_differences(trained_with, tokenizer or {}):
            problems.append(
                f"{setting} was trained with another tokenizer ({info.tokenizer.get('path')}; "
                f"{'; '.join(differences)}); its losses score other tokens: train a reference with "
                "this run's tokenizer"
            )
        check_config(reference_config(config, info), world_size, training=False)
    except ConfigError as error:
        for problem in error.problems:
            problems.append(f"{setting} cannot be run in this layout: {problem}")
    except ValueError as error:
        problems.append(f"selection.reference.checkpoint: {error}")
    return problems


def _missing_columns(config: Config, rules: ChoiceRules, corpora: list[Corpus]) -> list[str]:
    """Stored columns the selection reads and the score stores do not have."""
    if config.selection.reference.checkpoint:
        return []
    missing = []
    reader, wanted = f"selection.scorer {config.selection.scorer}", rules.stored_columns
    if config.selection.end_when_overtaken and "reference_loss" not in wanted:
        reader += " with end_when_overtaken"
        wanted |= {"reference_loss"}
    for corpus in corpora:
        if corpus.scores is None:
            continue
        stored = {presented_name(column) for column in corpus.scores.columns}
        if wanted - stored:
            missing.append(
                f"{reader} reads {', '.join(sorted(wanted))}, but the scores of {corpus.prefix} "
                f"hold only {', '.join(sorted(stored))}; score again with --columns, or choose "
                "another scorer"
            )
    return missing


def index_cache(config: Config) -> Path:
    """Folder of the sample indices."""
    return Path(config.data.index_cache or Path(config.run.folder, "index_cache"))
