"""What a run will need, and how long it will take, before any GPU is asked for: docs/scale.md."""

import argparse
import json
import sys
from pathlib import Path

from megatron_slm.checkpoint.architecture import differing_settings, take_architecture
from megatron_slm.checkpoint.folder import read_checkpoint_info
from megatron_slm.config.arguments import Program
from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError, load_yaml, parse_config
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.config.values import whole_number
from megatron_slm.data.manifest import CorpusManifest, manifest_path
from megatron_slm.installation import says_missing_extra
from megatron_slm.planning.efficiency import TORCH_NATIVE, TRANSFORMER_ENGINE
from megatron_slm.planning.hardware import GPU, GPUS, find_gpu
from megatron_slm.planning.job import Job
from megatron_slm.planning.propose import alternatives
from megatron_slm.planning.result import as_json, make_plan
from megatron_slm.planning.terminal import describe_alternatives, print_plan
from megatron_slm.selection.scorer_files import load_scorer_files
from megatron_slm.tokenization import load_tokenizer
from megatron_slm.training.scorer_settings import choice_rules

DESCRIPTION = """Compute from a recipe what a run will need: parameters, memory of one GPU by part,
FLOPs, traffic per link, the pipeline bubble, predicted tokens per second, GPU-hours, the sizes of
checkpoints and scores, and other layouts that fit.

Nothing is started; no corpus and no GPU is needed. All numbers are formulas (docs/scale.md has
them, with what is left out): sizes and memory of weights, gradients and optimizer are exact,
activations are held against measurements, times are a prediction at the measured share (or
--efficiency) of the data sheet's peak. Compare a real run's throughput/mfu_fraction with it, and
plan again with the efficiency it shows."""
EPILOG = """Settings of the run follow as for train, dotted: --parallel.tensor 4
--model.recompute full (all of them: python -m megatron_slm.train --help).

examples:
  python -m megatron_slm.plan --config launch/recipes/tinyllama_1.1b_math_slm.yaml --nodes 4
  python -m megatron_slm.plan --config launch/recipes/llama3_8b_slm.yaml --gpu H200 --nodes 16 \\
    --parallel.tensor 2 --parallel.sequence true
  python -m megatron_slm.plan --config RECIPE.yaml --json | jq .duration.tokens_per_second

exit codes: 0 it fits, 1 it does not fit (layouts that do are printed), 2 wrong usage or
configuration (for a number of GPUs that this configuration cannot use, what train would accept is
printed)"""


def build_parser() -> Program:
    parser = Program(
        "plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m megatron_slm.plan --config FILE [options] [--section.field VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="recipe, as for train (launch/recipes/)")
    parser.add_argument(
        "--gpu",
        default="H100",
        help=f"GPU type: {', '.join(gpu.name for gpu in GPUS)} (default: %(default)s)",
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        help="GPUs in each, joined by NVLink (default: %(default)s)",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        help=(
            "share of the peak while a GPU computes, 0..1; waiting and bubbles come on top "
            f"(default: as measured on one H200, {TRANSFORMER_ENGINE.training:.2f} with "
            f"Transformer Engine's layers and {TORCH_NATIVE.training:.2f} with torch-native ones; "
            "forward passes without gradients a little more)"
        ),
    )
    parser.add_argument(
        "--reference-config",
        metavar="FILE",
        help=(
            "recipe of the reference, where it is another model (default: the online reference's "
            "checkpoint, else this recipe)"
        ),
    )
    parser.add_argument(
        "--corpus-tokens",
        type=_whole_number,
        default=0,
        metavar="N",
        help=(
            "tokens of the training corpora, for epochs and scoring: 100e9, 100B or "
            "100_000_000_000 (default: of data.train if it is here, else one epoch)"
        ),
    )
    parser.add_argument(
        "--proposals",
        type=int,
        default=5,
        help="layouts to propose, 0 = none (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print everything as one JSON object, for programs"
    )
    return parser


@says_missing_extra("plan")
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options, settings = parser.parse_known_args(argv)
    parser.refuse_misspelled(settings)
    try:
        job = _job(options, settings)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    try:
        check_config(job.config, job.ranks)
        choice_rules(job.config.selection)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        found = alternatives(job) if options.proposals and isinstance(error, ConfigError) else []
        if found:
            print(describe_alternatives(found), file=sys.stderr)
        return 2
    for problem in _start_problems(job.config, job.vocabulary_size):
        print(f"plan: train would refuse this: {problem}", file=sys.stderr)
    plan = make_plan(job, options.proposals)
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print_plan(plan)
    return 0 if plan.fits else 1


def _job(options: argparse.Namespace, settings: list[str]) -> Job:
    """The job that the command line describes. ValueError names what is wrong with it."""
    gpu = _checked_gpu(options)
    recipe = ["--config", options.config] if options.config else []
    config = parse_config([*recipe, *settings], "slm-plan", DESCRIPTION, fill=take_architecture)
    load_scorer_files(config.selection.scorer, config.selection.scorer_options)
    return Job(
        config,
        _vocabulary_size(config),
        gpu,
        options.nodes,
        options.gpus_per_node,
        options.efficiency,
        reference=_reference_model(options.reference_config, config),
        corpus_tokens=options.corpus_tokens or _corpus_tokens(config),
    )


def _whole_number(text: str) -> int:
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _checked_gpu(options: argparse.Namespace) -> GPU:
    """The GPU that is named; ConfigError with everything that is wrong with the options."""
    problems = [
        f"--{name.replace('_', '-')}: got {getattr(options, name)}; expected at least {least}"
        for name, least in (
            ("nodes", 1),
            ("gpus_per_node", 1),
            ("corpus_tokens", 0),
            ("proposals", 0),
        )
        if getattr(options, name) < least
    ]
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        problems.append(
            f"--efficiency: got {options.efficiency}; expected above 0 and at most 1 (0.5 is 50 % "
            "of the peak)"
        )
    gpu = find_gpu(options.gpu)
    if gpu is None:
        problems.append(
            f"--gpu: got {options.gpu!r}; expected one of {', '.join(gpu.name for gpu in GPUS)}"
        )
    if problems or gpu is None:
        raise ConfigError(problems)
    return gpu


def _vocabulary_size(config: Config) -> int:
    if config.model.vocabulary_size:
        return config.model.vocabulary_size
    if not Path(config.data.tokenizer).is_file():
        raise ConfigError(
            [
                "model.vocabulary_size: 0, which means the tokenizer's, and there is no file "
                f"{config.data.tokenizer!r}; give the size"
            ]
        )
    return load_tokenizer(config.data.tokenizer).vocabulary_size


def _start_problems(config: Config, vocabulary_size: int) -> list[str]:
    """How this model differs from the checkpoint it would start from, where that lies here."""
    start, tokenizer = Path(config.checkpoint.initialize_from), Path(config.data.tokenizer)
    if not config.checkpoint.initialize_from or not start.exists():
        return []
    try:
        return differing_settings(
            config,
            vocabulary_size,
            load_tokenizer(tokenizer) if tokenizer.is_file() else None,
            resumable=False,  # the question is how a new run would start
        )
    except ValueError as error:
        return [str(error)]


def _reference_model(recipe: str | None, config: Config) -> ModelConfig | None:
    """The shape of the reference where it is known.

    It is taken from its own recipe, or from the checkpoint of an online reference.
    """
    checkpoint = config.selection.reference.checkpoint
    if recipe:
        return load_yaml(recipe, take_architecture).model
    if not checkpoint or not Path(checkpoint).exists():
        return None
    return read_checkpoint_info(checkpoint).reference_model()


def _corpus_tokens(config: Config) -> int:
    """Tokens of the training corpora if all of them are on this machine, else 0."""
    if not all(manifest_path(prefix).is_file() for prefix in config.data.train):
        return 0
    return sum(CorpusManifest.read(prefix).tokens for prefix in config.data.train)


if __name__ == "__main__":
    sys.exit(main())
