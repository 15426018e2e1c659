"""The options of python -m megatron_slm.import_scores, and the manifest of the store that they
fill. No torch.
"""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count, Size
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_manifest import ScoreManifest, default_shard_tokens
from megatron_slm.files.hashing import file_sha256
from megatron_slm.scoring.foreign_model import huggingface_fingerprint
from megatron_slm.scoring.options import column_names, parse_job_slice, resume_command

DESCRIPTION = """Take token scores made elsewhere into a score store, checked against the corpus
token for token.

Sources (exactly one): arrays with one value per token of the corpus; jsonl with one record of
natural log-probabilities per document; a Hugging Face causal model, run here through transformers.
"""
EXAMPLE = """examples:
  python -m megatron_slm.import_scores --corpus data/corpus --output data/scores \\
      --huggingface models/reference --window-tokens 2048
  python -m megatron_slm.import_scores --corpus data/corpus --output data/scores \\
      --jsonl scores.jsonl --window-tokens 4096
  python -m megatron_slm.import_scores --corpus data/corpus --output data/both \\
      --window-tokens 2048 --column prior=data/prior_scores/loss.bin \\
      --column conditional=data/conditional_scores/loss.bin

A Hugging Face model runs in any number of processes, each with the whole model and its own shards:
  torchrun --nproc-per-node 8 -m megatron_slm.import_scores --huggingface ... --device cuda

exit codes: 0 done, 2 bad usage, 3 bad data, 85 stopped by a signal. Started again, it continues."""
_READ_BY = {
    "key": "jsonl",
    "columns": "huggingface",
    "precision": "huggingface",
    "device": "huggingface",
    "micro_batch_size": "huggingface",
    "shard": "huggingface",
}
"""Options that one source alone reads."""


@dataclass(frozen=True)
class ImportOptions:
    """Checked options; one of arrays, jsonl and huggingface is not empty."""

    corpus: str
    output: str
    arrays: tuple[tuple[str, str], ...]
    """(column, file) each."""
    jsonl: str
    key: str
    huggingface: str
    columns: tuple[str, ...]
    window_tokens: int
    stride_tokens: int
    document_policy: str
    description: str
    dtype: str
    shard_tokens: int
    """0 = the default."""
    precision: str
    device: str
    micro_batch_size: int
    job_slice: tuple[int, int]
    """(i, n): the shards s with s % n == i."""

    @property
    def files(self) -> list[str]:
        """The files, or the folder, that the scores come from."""
        return [path for _, path in self.arrays] or [self.jsonl or self.huggingface]


def build_parser() -> Program:
    """The options as they are written."""
    parser = Program(
        "import_scores",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--corpus", required=True, metavar="C", help="prefix of the corpus the scores are of"
    )
    parser.add_argument("--output", required=True, metavar="S", help="score-store folder to write")
    _add_sources(parser)
    _add_context(parser)
    stored = parser.add_argument_group("storage")
    stored.add_argument(
        "--dtype",
        choices=("fp16", "fp32"),
        default="fp16",
        help="stored precision (default: %(default)s)",
    )
    stored.add_argument(
        "--shard-tokens",
        type=number_in(Count),
        default=0,
        help="tokens per shard (default: at least 262,144, at most 4096 shards)",
    )
    _add_model(parser)
    return parser


def _add_sources(parser: Program) -> None:
    source = parser.add_argument_group("sources")
    source.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=".npy, or raw fp16/fp32 (for example another store's loss.bin); may be repeated. "
        "`loss` is presented to scorers as reference_loss",
    )
    source.add_argument(
        "--jsonl",
        metavar="FILE",
        help="one record per document, in corpus order; optional token_ids are compared",
    )
    source.add_argument(
        "--key",
        default="logprobs",
        help="key of the log-probabilities in a jsonl record (default: %(default)s)",
    )
    source.add_argument(
        "--huggingface",
        metavar="FOLDER",
        help="local folder of a causal model with the corpus's tokenizer",
    )


def _add_context(parser: Program) -> None:
    context = parser.add_argument_group(
        "context the tokens were (or will be) scored in; kept in the manifest, compared with "
        "training"
    )
    context.add_argument(
        "--window-tokens",
        type=number_in(Size),
        required=True,
        help="tokens the reference reads at once",
    )
    context.add_argument(
        "--stride-tokens",
        type=number_in(Count),
        default=0,
        help="new tokens per window (default: the window)",
    )
    context.add_argument(
        "--document-policy",
        choices=("packed", "isolated"),
        default="packed",
        help="packed = windows run across documents",
    )
    context.add_argument("--description", default="", help="what made the scores, for people")


def _add_model(parser: Program) -> None:
    model = parser.add_argument_group("with --huggingface")
    model.add_argument(
        "--columns", default="loss", help="loss, or loss,entropy (default: %(default)s)"
    )
    model.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 rounds the logits, which moves 0.4 to 4 %% of the selection",
    )
    model.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda (each process its own GPU), or the GPU of one process, for example cuda:1 "
        "(default: %(default)s)",
    )
    model.add_argument(
        "--micro-batch-size",
        type=number_in(Size),
        default=1,
        help="windows per forward pass (default: %(default)s)",
    )
    model.add_argument(
        "--shard",
        default="0/1",
        metavar="i/n",
        help="this job's share of the shards, i from 0 (default: %(default)s)",
    )


def parse(argv: list[str]) -> ImportOptions:
    """The options on a command line. ValueError when they do not go together."""
    given = build_parser().parse_args(argv)
    columns = _columns(given)
    _refuse_unused(given)
    return ImportOptions(
        corpus=given.corpus,
        output=given.output,
        arrays=tuple((name, path) for name, _, path in map(_split, given.column)),
        jsonl=given.jsonl or "",
        key=given.key,
        huggingface=given.huggingface or "",
        columns=columns,
        window_tokens=given.window_tokens,
        stride_tokens=given.stride_tokens or given.window_tokens,
        document_policy=given.document_policy,
        description=given.description,
        dtype=given.dtype,
        shard_tokens=given.shard_tokens,
        precision=given.precision,
        device=given.device,
        micro_batch_size=given.micro_batch_size,
        job_slice=parse_job_slice(given.shard),
    )


def _split(pair: str) -> tuple[str, str, str]:
    return pair.partition("=")


def _columns(given: argparse.Namespace) -> tuple[str, ...]:
    if sum((bool(given.column), given.jsonl is not None, given.huggingface is not None)) != 1:
        raise ValueError(
            "give exactly one source: --column NAME=FILE (one or more), --jsonl FILE or "
            "--huggingface FOLDER"
        )
    if given.column:
        for pair in given.column:
            name, _, path = _split(pair)
            if not (name and path):
                raise ValueError(f"--column {pair}: expected NAME=FILE")
        return tuple(_split(pair)[0] for pair in given.column)
    columns = ("loss",) if given.jsonl else column_names(given.columns)
    if "loss" not in columns or set(columns) - {"loss", "entropy"}:
        raise ValueError(f"--columns {given.columns}: expected loss, or loss,entropy")
    return columns


def _refuse_unused(given: argparse.Namespace) -> None:
    """ValueError when an option is given that the chosen source does not read."""
    parser = build_parser()
    unused = []
    for name, source in _READ_BY.items():
        if not getattr(given, source) and getattr(given, name) != parser.get_default(name):
            unused.append(f"--{name.replace('_', '-')} goes with --{source} only, leave it out")
    if unused:
        raise ValueError("; ".join(unused))


def refuse_processes_without_work(options: ImportOptions, processes: int) -> None:
    """ValueError where several processes were started and one would do all the work."""
    if processes == 1:
        return
    if not options.huggingface:
        raise ValueError(
            f"{processes} processes were started; --column and --jsonl are copied by one: start it "
            "without torchrun"
        )
    if ":" in options.device:
        raise ValueError(
            f"--device {options.device}: {processes} processes would share this GPU; give cuda, "
            "and each has its own"
        )


def manifest_of(options: ImportOptions, argv: list[str], corpus: CorpusManifest) -> ScoreManifest:
    """The manifest of the store that the options fill; hashes the source of the scores."""
    if options.huggingface:
        fingerprint = huggingface_fingerprint(options.huggingface)
    else:
        fingerprint = ",".join("sha256:" + file_sha256(path) for path in options.files)
    description = options.description or ", ".join(str(Path(path)) for path in options.files)
    return ScoreManifest(
        corpus_fingerprint=corpus.fingerprint,
        corpus_tokens=corpus.tokens,
        corpus_documents=corpus.documents,
        tokenizer_fingerprint=corpus.tokenizer["fingerprint"],
        reference_fingerprint=fingerprint,
        reference_description=description,
        window_tokens=options.window_tokens,
        stride_tokens=options.stride_tokens,
        document_policy=options.document_policy,
        shard_tokens=options.shard_tokens or default_shard_tokens(corpus.tokens),
        dtype=options.dtype,
        columns=options.columns,
        resume_command=f"python -m megatron_slm.import_scores {shlex.join(resume_command(argv))}",
    )
