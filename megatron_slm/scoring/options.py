"""The settings of a scoring run, and every check that needs no process group."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_slm.config import load
from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.ranges import Count, Fraction, Size, out_of_range
from megatron_slm.config.schema import Config, DeviceConfig, ParallelConfig
from megatron_slm.data.manifest import CorpusManifest, check_corpus
from megatron_slm.data.score_manifest import ScoreManifest, default_shard_tokens
from megatron_slm.scoring.fp8_options import fp8_description, fp8_problems, fp8_size_problems
from megatron_slm.scoring.reference import Reference, open_reference, scoring_config
from megatron_slm.tokenization import load_tokenizer

EXTRA_COLUMNS = ("entropy",)
Options = TypeVar("Options")
Precision = Literal["checkpoint", "fp32", "bf16", "fp16"]
STORE = load.PrintedPath("print_output", lambda options: options.output)


@dataclass
class ScoreDevice(DeviceConfig):
    """What the reference computes on."""

    # A choice more than training has, so the base class's type is not kept; `prepare` replaces
    # "checkpoint" before a DeviceConfig is made of it.
    precision: Precision = "checkpoint"  # type: ignore[assignment]
    """Precision of the reference's weights; checkpoint = as it was trained. Losses come from
    fp32-accumulated logits either way.
    """


@dataclass
class ScoreOptions:
    """Settings of python -m megatron_slm.score."""

    checkpoint: str
    """The reference: a run folder (its newest checkpoint), or one step_* folder."""
    corpus: str
    """Prefix of the corpus to score: PREFIX.bin, PREFIX.idx, PREFIX.manifest.json."""
    output: str
    """Score-store folder to write. An unfinished one with the same settings is continued."""
    tokenizer: str = ""
    """Checked against the corpus and the reference when given; scoring itself needs none."""
    window_tokens: Count = 0
    """Tokens the reference reads at once; 0 = the length it was trained with. Use the length you
    will train with.
    """
    stride_tokens: Count = 0
    """New tokens per window; 0 = window_tokens (no overlap). Half a window costs twice as much and
    gives every token half a window of context.
    """
    document_policy: Literal["packed", "isolated"] = "packed"
    """packed = windows run across documents, as training sequences do; isolated = no token sees
    another document.
    """
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Stored precision, 2 or 4 bytes per token; fp16 swaps about 0.1 % of the selection or less."""
    columns: str = "loss"
    """Columns to store, separated by commas: loss, entropy (both in nats)."""
    micro_batch_size: Size = 8
    """Windows per forward pass."""
    shard_tokens: Count = 0
    """Tokens per shard, the unit of resuming and of sharing work; 0 = at least 262,144 and at most
    4096 shards.
    """
    shard: str = "0/1"
    """This job's share, i/n with i from 0 (array jobs:
    $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT): it takes shards i, i+n, i+2n, ...
    """
    fp8_model: str = ""
    """With device.fp8: a checkpoint of the model that will be trained with these scores. Before the
    corpus, some windows are scored in fp32, bf16 and fp8, and how much of the selection changes is
    printed and stored.
    """
    fp8_windows: Size = 64
    """With device.fp8: windows to measure that on."""
    fp8_keep_fraction: Fraction = 0.6
    """With device.fp8: the keep fraction to measure it at."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the reference is spread; the other processes are data-parallel."""
    device: ScoreDevice = field(default_factory=ScoreDevice)
    """What it computes on."""


def parse(argv: list[str], description: str) -> ScoreOptions:
    """The settings of score, as `parse_program` reads them."""
    usage = "--checkpoint RUN --corpus PREFIX --output STORE [options]"
    return parse_program("score", argv, description, ScoreOptions, usage, STORE)


def parse_program(
    program: str,
    argv: list[str],
    description: str,
    options_class: type[Options],
    usage: str,
    printed_path: load.PrintedPath,
    problems_of: Callable[[Options], Iterable[str]] = lambda options: (),
) -> Options:
    """The settings on the command line and in --config.

    Prints the help if an option requests it. When there are problems, prints all of them, on the
    job's first process, and exits with code 2.
    """
    arguments = [with_underscores(argument) for argument in argv]
    try:
        options = load.parse_config(
            arguments,
            f"slm-{program}",
            description,
            options_class,
            usage,
            printed_path=printed_path,
        )
        if problems := list(problems_of(options)):
            raise ConfigError(problems)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return options


def with_underscores(argument: str) -> str:
    """--window-tokens=512, the data programs' spelling, as --window_tokens=512."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


@dataclass(frozen=True)
class ScoringJob:
    """Checked settings: everything opened, nothing started."""

    options: ScoreOptions
    corpus: CorpusManifest
    reference: Reference
    config: Config
    manifest: ScoreManifest
    job_slice: tuple[int, int]
    fp8_model: Reference | None = None
    """The model to be trained, where the reference computes in fp8."""


def prepare(options: ScoreOptions, world_size: int, argv: list[str]) -> ScoringJob:
    """Open and check what scoring needs; ConfigError lists every bad setting, ValueError names bad
    data.
    """
    problems = [*option_problems(options)]
    try:
        job_slice = parse_job_slice(options.shard)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    corpus, reference = _open(options)
    window_tokens = options.window_tokens or reference.info.sequence_length
    device = dataclasses.asdict(options.device)
    if device["precision"] == "checkpoint":
        device["precision"] = reference.info.precision
    config = scoring_config(reference, window_tokens, options.parallel, DeviceConfig(**device))
    check_config(config, world_size, training=False)
    fp8_model = None
    if options.fp8_model:
        fp8_model = open_reference(options.fp8_model, corpus)
        if problems := fp8_size_problems(options, window_tokens):
            raise ConfigError(problems)
        other = scoring_config(fp8_model, window_tokens, options.parallel, DeviceConfig())
        check_config(other, world_size, training=False)
    manifest = ScoreManifest(
        corpus_fingerprint=corpus.fingerprint,
        corpus_tokens=corpus.tokens,
        corpus_documents=corpus.documents,
        tokenizer_fingerprint=corpus.tokenizer["fingerprint"],
        reference_fingerprint=reference.fingerprint,
        reference_description=reference.description + fp8_description(config.device),
        window_tokens=window_tokens,
        stride_tokens=options.stride_tokens or window_tokens,
        document_policy=options.document_policy,
        shard_tokens=options.shard_tokens or default_shard_tokens(corpus.tokens),
        dtype=options.dtype,
        columns=column_names(options.columns),
        resume_command=f"torchrun --nproc-per-node {world_size} -m megatron_slm.score "
        f"{shlex.join(resume_command(argv))}",
    )
    return ScoringJob(options, corpus, reference, config, manifest, job_slice, fp8_model)


def _open(options: ScoreOptions) -> tuple[CorpusManifest, Reference]:
    """The corpus and the reference, checked against each other. ValueError with everything that is
    wrong with them at once.
    """
    problems: list[str] = []
    expected: Mapping[str, Any] | None = None
    corpus: CorpusManifest | None = None
    reference: Reference | None = None
    try:
        expected = load_tokenizer(options.tokenizer).entry if options.tokenizer else None
    except (ValueError, OSError) as error:
        problems.append(f"tokenizer: {error}")
    try:
        corpus = check_corpus(options.corpus, tokenizer=expected)
    except (ValueError, OSError) as error:
        problems.append(f"corpus: {error}")
    try:
        reference = open_reference(options.checkpoint, corpus)
    except (ValueError, OSError) as error:
        problems.append(f"checkpoint: {error}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ValueError(f"{count} with what scoring reads:{listed}")
    assert corpus is not None  # else there was a problem
    assert reference is not None
    return corpus, reference


def column_names(text: str) -> tuple[str, ...]:
    """The names in "loss, entropy"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_job_slice(text: str) -> tuple[int, int]:
    """ "i/n" as numbers, 0 <= i < n."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(
            f"shard: got {text!r}; expected i/n with i from 0 to n - 1, for example 0/4"
        )
    return int(part), int(parts)


def resume_command(argv: list[str]) -> list[str]:
    """The arguments that complete this store as one job: without --shard."""
    arguments = list(argv)
    for position, argument in enumerate(arguments):
        if argument == "--shard":
            del arguments[position : position + 2]
            break
        if argument.startswith("--shard="):
            del arguments[position]
            break
    return arguments


def option_problems(options: ScoreOptions) -> list[str]:
    """What is wrong with the options alone, one sentence each."""
    problems = [sentence for _, sentence in out_of_range(options)]
    columns = column_names(options.columns)
    unknown = set(columns) - {"loss", *EXTRA_COLUMNS}
    if "loss" not in columns or unknown or len(set(columns)) != len(columns):
        problems.append(f"columns: got {options.columns!r}; expected loss, or loss,entropy")
    if 0 < options.window_tokens < options.stride_tokens:
        problems.append(
            f"stride_tokens: got {options.stride_tokens}, above window_tokens "
            f"({options.window_tokens}); tokens between windows would get no score"
        )
    problems += fp8_problems(options)
    problems += forward_only_problems(options.parallel, options.device, "scoring")
    return problems


def forward_only_problems(parallel: ParallelConfig, device: DeviceConfig, work: str) -> list[str]:
    """What is set that only training reads, one sentence each. work: what is done instead."""
    unused = [
        name
        for name in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
        if getattr(parallel, name) is True
    ]
    problems = [
        f"parallel.{name}: got true; {work} has no gradients, leave it out" for name in unused
    ]
    if device.head_engine != "torch":
        problems.append(
            f"device.head_engine: got {device.head_engine}; it computes the head's "
            f"backward, and {work} has none: leave it at torch"
        )
    training_only = ("step_timeout_minutes", "garbage_collection_steps", "flight_recorder_entries")
    for name in training_only:
        value = getattr(device, name)
        if value != getattr(DeviceConfig, name):
            problems.append(
                f"device.{name}: got {value}; it is about training steps, and {work} has none: "
                "leave it out"
            )
    if parallel.virtual_pipeline > 1:
        problems.append(
            f"parallel.virtual_pipeline: got {parallel.virtual_pipeline}; {work} runs "
            "forward only and gains nothing by it, leave it at 1"
        )
    return problems
