"""Everything that an evaluation reads, opened and checked before torch is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.begin_token import other_than_trained
from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError, load_yaml
from megatron_slm.config.schema import Config, CorpusConfig, DeviceConfig
from megatron_slm.config.sizes import model_parallel_size
from megatron_slm.data.corpora import Corpus, UnusableData, nothing_counts, open_corpora
from megatron_slm.evaluation.options import EvaluateOptions
from megatron_slm.evaluation.token_sets import OpenedSet, open_sets
from megatron_slm.scoring.foreign_model import (
    huggingface_fingerprint,
    stored_precision,
    tokenizer_problem,
)
from megatron_slm.scoring.reference import Reference, open_reference, scoring_config
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences


@dataclass(frozen=True)
class EvaluationJob:
    """Checked settings: everything opened, nothing started."""

    options: EvaluateOptions
    config: Config
    """Sequence length, batch, layout and device; of a checkpoint also its model."""
    corpora: dict[str, Corpus]
    """By their names in the metrics."""
    token_sets: dict[str, list[OpenedSet]]
    """By the names of their corpora."""
    tokenizer: Tokenizer | None
    """None where the file cannot be loaded; there are no bits per byte then."""
    checkpoint: Reference | None
    """None = a Hugging Face model."""
    run_folder: Path | None
    """The run that the checkpoint belongs to."""
    run_config: Config | None
    warnings: list[str]

    @property
    def fingerprint(self) -> str:
        """The identity of the weights."""
        if self.checkpoint is not None:
            return self.checkpoint.fingerprint
        return huggingface_fingerprint(self.options.huggingface)

    @property
    def model(self) -> str:
        """Which model it is, for people."""
        return self.checkpoint.description if self.checkpoint else self.options.huggingface


def prepare(options: EvaluateOptions, world_size: int) -> EvaluationJob:
    """Open and check what an evaluation reads; ConfigError lists every bad setting, ValueError
    everything that is wrong with the data.
    """
    checkpoint = open_reference(options.checkpoint, None) if options.checkpoint else None
    run_folder = _run_of(checkpoint)
    run_config = load_yaml(run_folder / "config.yaml") if run_folder else None
    named = options.corpora or (run_config.data.validation if run_config else [])
    if not named:
        raise ConfigError(
            [
                f"corpora: got none, and {options.checkpoint} belongs to no run with "
                "data.validation; name some: --corpora '[{name: held_out, corpus: data/held_out}]'"
            ]
        )
    config = _config(options, checkpoint, run_config, world_size)
    if options.wandb:
        _refuse_without_wandb(options, run_folder, run_config)
    corpora, problems = _open_corpora(named, checkpoint, options.huggingface)
    token_sets, of_sets = open_sets(options.token_sets, corpora, {each.name for each in named})
    if problems + of_sets:
        raise ValueError("\n  - ".join(["what is read cannot be used:", *problems, *of_sets]))
    tokenizer, warnings = _open_tokenizer(options.tokenizer, corpora)
    if checkpoint is not None:
        begins = {corpus.prefix: corpus.manifest.prepend_bos for corpus in corpora.values()}
        warnings += other_than_trained(checkpoint.folder, checkpoint.info.tokenizer, begins)
    return EvaluationJob(
        options,
        config,
        corpora,
        token_sets,
        tokenizer,
        checkpoint,
        run_folder,
        run_config,
        warnings,
    )


def _run_of(checkpoint: Reference | None) -> Path | None:
    """The run folder around a checkpoint; None where there is none with a configuration."""
    if checkpoint is None:
        return None
    checkpoints = Path(checkpoint.folder).absolute().parent
    is_run = checkpoints.name == "checkpoints" and (checkpoints.parent / "config.yaml").is_file()
    return checkpoints.parent if is_run else None


def _config(
    options: EvaluateOptions,
    checkpoint: Reference | None,
    run_config: Config | None,
    world_size: int,
) -> Config:
    device = dataclasses.asdict(options.device)
    if device["precision"] == "checkpoint":
        device["precision"] = (
            checkpoint.info.precision if checkpoint else stored_precision(options.huggingface)
        )
    if checkpoint is not None:
        length = options.sequence_length or checkpoint.info.sequence_length
        config = scoring_config(checkpoint, length, options.parallel, DeviceConfig(**device))
    else:
        config = Config(device=DeviceConfig(**device))
        config.data.sequence_length = options.sequence_length
    policy = options.document_policy
    if policy == "as_trained":
        policy = run_config.data.document_policy if run_config else "packed"
    ranks = max(1, world_size // model_parallel_size(config))
    # Pipeline stages overlap over the micro-batches of one call.
    per_call = 8 * config.parallel.pipeline if config.parallel.pipeline > 1 else 1
    config.data = replace(
        config.data,
        document_policy=policy,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * ranks * per_call,
    )
    if checkpoint is not None:
        check_config(config, world_size, training=False)
    return config


def _refuse_without_wandb(
    options: EvaluateOptions, run_folder: Path | None, run_config: Config | None
) -> None:
    """ConfigError where training has logged to no W&B run that the results could join."""
    reason = ""
    if run_folder is None or run_config is None:
        reason = f"{options.checkpoint} belongs to no run folder"
    elif not (run_folder / "wandb_run_id").is_file():
        reason = f"{run_folder} has no W&B run (no wandb_run_id)"
    elif run_config.monitoring.wandb.mode == "disabled":
        reason = f"monitoring.wandb.mode is disabled in {run_folder}"
    if reason:
        raise ConfigError([f"wandb: got true, but {reason}; leave it out"])


def _open_corpora(
    named: list[CorpusConfig], checkpoint: Reference | None, huggingface: str
) -> tuple[dict[str, Corpus], list[str]]:
    """The corpora by their names, and what is wrong with them."""
    corpora: dict[str, Corpus] = {}
    problems: list[str] = []
    for each in named:
        try:
            [corpus] = open_corpora([each.corpus])
        except UnusableData as error:
            unusable = error.corpora
        except OSError as error:
            unusable = [str(error)]
        else:
            corpora[each.name] = corpus
            entry = corpus.manifest.tokenizer
            other = (
                _other_tokenizer(checkpoint, entry)
                if checkpoint
                else tokenizer_problem(huggingface, entry)
            )
            unusable = [problem for problem in (nothing_counts(corpus), other) if problem]
        problems += [f"corpora {each.name}: {problem}" for problem in unusable]
    if not problems:
        problems += _of_several_tokenizers(corpora)
    return corpora, problems


def _of_several_tokenizers(corpora: Mapping[str, Corpus]) -> list[str]:
    """Corpora of a Hugging Face model whose folder holds no tokenizer are compared with each
    other.
    """
    (first, corpus), *others = corpora.items()
    entry = corpus.manifest.tokenizer
    return [
        f"corpora {name}: made with another tokenizer than {first} ({'; '.join(differences)})"
        for name, other in others
        if (differences := tokenizer_differences(other.manifest.tokenizer, entry))
    ]


def _other_tokenizer(checkpoint: Reference, entry: Mapping[str, Any]) -> str:
    """Why a checkpoint cannot read a corpus of this tokenizer; "" when it can."""
    trained_with = {"fingerprint": "unknown", **checkpoint.info.tokenizer}
    differences = tokenizer_differences(trained_with, entry)
    if not differences:
        return ""
    return (
        f"{checkpoint.folder} was trained with the tokenizer {trained_with.get('path')}, the "
        f"corpus was made with {entry['path']}: {'; '.join(differences)}. Preprocess the text with "
        "the checkpoint's tokenizer."
    )


def _open_tokenizer(
    given: str, corpora: Mapping[str, Corpus]
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of the corpora, or a warning that it cannot be had.

    ValueError where one is given and is another.
    """
    entry = next(iter(corpora.values())).manifest.tokenizer
    try:
        tokenizer = load_tokenizer(given or entry["path"])
        differences = tokenizer_differences(tokenizer.entry, entry)
    except (ValueError, OSError) as error:
        if given:
            raise ValueError(f"tokenizer: {error}") from None
        tokenizer, differences = None, [str(error)]
    if given and differences:
        raise ValueError(
            f"tokenizer: {given} is not the one that the corpora were made with: "
            f"{'; '.join(differences)}"
        )
    if not differences:
        return tokenizer, []
    return None, [
        f"bits per byte are left out, because the corpora's tokenizer {entry['path']} cannot be "
        f"read ({'; '.join(differences)}); name it with --tokenizer"
    ]
