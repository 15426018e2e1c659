"""Everything a run reads, opened and checked before torch is imported and processes join."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from megatron_slm.data.position import DataPosition
from megatron_slm.data.score_manifest import presented_name
from megatron_slm.files.redact import redacted
from megatron_slm.selection.rules import ChoiceRules
from megatron_slm.selection.scorer_files import loaded_scorer_files
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences
from megatron_slm.training import resume
from megatron_slm.training.reference import reference_config
from megatron_slm.training.scorer_settings import choice_rules

if TYPE_CHECKING:
    from megatron_slm.data.loader import TrainingLoader, ValidationLoader
    from megatron_slm.parallel import Groups


class RunInputError(ConfigError):
    """What a configuration points to cannot be used: files missing, damaged, or of another tokenizer."""


@dataclass(frozen=True)
class RunInputs:
    """Checked inputs of a run."""

    tokenizer: Tokenizer
    corpora: list[Corpus]
    validation: dict[str, Corpus]
    vocabulary_size: int


def open_run_inputs(config: Config, world_size: int = 1) -> RunInputs:
    """Open scorer, tokenizer, corpora, score stores and what the run starts from. ConfigError (a bad selection among them) or RunInputError
    lists every problem in one go; `world_size` is that of the job, for the layout of an online reference."""
    rules, bad_settings = None, []
    try:
        rules = choice_rules(config.selection)
    except ValueError as error:
        bad_settings.append(str(error))
    problems: list[str] = []
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except (ValueError, OSError) as error:
        problems.append(f"data.tokenizer: {error}")
    entry = tokenizer.entry if tokenizer else None
    corpora, validation = [], {}
    try:
        corpora = open_corpora(
            config.data.train,
            config.selection.reference.scores,
            tokenizer=entry,
            allow_missing_scores=config.selection.reference.allow_missing_scores,
        )
    except UnusableData as error:
        problems += [f"data.train: {problem}" for problem in error.corpora]
        problems += [f"selection.reference.scores: {problem}" for problem in error.scores]
    for held_out in config.data.validation:
        try:
            (validation[held_out.name],) = open_corpora([held_out.corpus], tokenizer=entry)
        except UnusableData as error:
            problems += [f"data.validation {held_out.name}: {each}" for each in error.corpora]
    length = config.data.sequence_length
    problems += [
        f"data.train: {problem}"
        for corpus in corpora
        if (problem := too_few_tokens(corpus, length) or nothing_counts(corpus))
    ]
    problems += [
        f"data.validation {name}: {problem}"
        for name, corpus in validation.items()
        if (problem := nothing_counts(corpus))
    ]
    smallest = tokenizer.vocabulary_size if tokenizer else 0
    size = config.model.vocabulary_size or smallest
    if size < smallest:
        problems.append(
            f"model.vocabulary_size: got {size}, below the tokenizer's {smallest}; raise it, or set it to 0"
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
    if problems:
        raise RunInputError(problems)
    run_inputs = RunInputs(tokenizer, corpora, validation, size)
    if (saved := resume.newest_saved(config.run.folder)) is not None:
        check_resume(config, run_inputs, saved)
    return run_inputs


def check_resume(config: Config, run_inputs: RunInputs, saved: resume.Saved) -> None:
    """ConfigError or RunInputError, with every problem, when the run cannot go on from `saved` with
    these settings and inputs.
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
    problems = []
    if reference := config.selection.reference.checkpoint:
        try:
            info = read_checkpoint_info(reference)
            trained_with = {"fingerprint": "unknown", **info.tokenizer}
            if differences := tokenizer_differences(trained_with, tokenizer or {}):
                problems.append(
                    f"selection.reference.checkpoint {reference} was trained with another tokenizer "
                    f"({info.tokenizer.get('path')}; {'; '.join(differences)}); its losses score other tokens: train a reference "
                    "with this run's tokenizer"
                )
            check_config(reference_config(config, info), world_size, training=False)
        except ConfigError as error:
            problems += [
                f"selection.reference.checkpoint {reference} cannot be run in this layout: {problem}"
                for problem in error.problems
            ]
        except ValueError as error:
            problems.append(f"selection.reference.checkpoint: {error}")
    return problems


def _missing_columns(config: Config, rules: ChoiceRules, corpora: list[Corpus]) -> list[str]:
    """Stored columns the scorer reads and the score stores do not have."""
    wanted = rules.stored_columns
    if config.selection.reference.checkpoint:
        return []
    missing = []
    for corpus in corpora:
        if corpus.scores is None:
            continue
        there = {presented_name(column) for column in corpus.scores.columns}
        if wanted - there:
            missing.append(
                f"selection.scorer {config.selection.scorer} reads {', '.join(sorted(wanted))}, but the scores of {corpus.prefix} hold only "
                f"{', '.join(sorted(there))}; score again with --columns, or choose another scorer"
            )
    return missing


def training_loader(
    config: Config, run_inputs: RunInputs, groups: Groups, position: DataPosition, samples: int
) -> TrainingLoader:
    """This rank's micro-batches of the next `samples` samples after `position`, in an order that a longer run only extends."""
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.data.scored_dataset import training_dataset

    data = config.data
    dataset = training_dataset(
        run_inputs.corpora,
        sequence_length=position.sequence_length,
        seed=position.seed,
        samples=position.samples + samples,
        weights=position.weights,
        pasts=position.pasts,
        index_cache=index_cache(config),
        isolate_documents=data.document_policy == "isolated",
    )
    return TrainingLoader(
        dataset,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=position.samples,
    )


def index_cache(config: Config) -> Path:
    """Folder of the sample indices."""
    return Path(config.data.index_cache or Path(config.run.folder, "index_cache"))


def validation_loaders(
    config: Config, run_inputs: RunInputs, groups: Groups
) -> dict[str, ValidationLoader]:
    """One loader per validation corpus: the same global batches at every validation."""
    from megatron_slm.data.loader import ValidationLoader
    from megatron_slm.data.scored_dataset import validation_dataset

    data = config.data
    return {
        name: ValidationLoader(
            validation_dataset(
                corpus,
                sequence_length=data.sequence_length,
                index_cache=index_cache(config),
                isolate_documents=data.document_policy == "isolated",
            ),
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            global_batches=config.monitoring.validation_batches,
        )
        for name, corpus in run_inputs.validation.items()
    }


def write_versions(folder: Path) -> None:
    """versions.txt: Python, packages, git revision and command, so that the run folder stands alone."""
    import importlib.metadata
    import platform
    import subprocess

    import megatron_slm

    lines = [
        f"megatron-slm {megatron_slm.__version__}",
        f"command {redacted(' '.join(sys.argv))}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
    ]
    for package in (
        "torch",
        "megatron-core",
        "transformer-engine",
        "apex",
        "sentencepiece",
        "numpy",
        "wandb",
        "transformers",
    ):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    lines += [f"scorer file {line}" for line in loaded_scorer_files()]
    source = Path(megatron_slm.__file__).parent
    revision = subprocess.run(
        ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    lines.append(f"git {revision.stdout.strip() or 'not a git checkout'}")
    (folder / "versions.txt").write_text("\n".join(lines) + "\n")
