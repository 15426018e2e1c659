"""Take token scores made elsewhere into a score store; see docs/scoring.md."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count, Size
from megatron_slm.data.manifest import CorpusManifest, check_corpus
from megatron_slm.data.score_manifest import ScoreManifest, default_shard_tokens
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.files.hashing import file_sha256
from megatron_slm.scoring.options import column_names, parse_job_slice, resume_command
from megatron_slm.scoring.summary import finish, means, pending_shards
from megatron_slm.training.stop_signals import StopSignals

DESCRIPTION = """Take token scores made elsewhere into a score store, checked against the corpus token for token.

Sources (exactly one): arrays with one value per token of the corpus; jsonl with one record of natural log-probabilities per
document; a Hugging Face causal model, run here through transformers."""
EXAMPLE = """examples:
  python -m megatron_slm.import_scores --corpus data/corpus --output data/scores --huggingface models/reference --window-tokens 2048
  python -m megatron_slm.import_scores --corpus data/corpus --output data/scores --jsonl scores.jsonl --window-tokens 4096
  python -m megatron_slm.import_scores --corpus data/corpus --output data/both --window-tokens 2048 \\
      --column prior=data/prior_scores/loss.bin --column conditional=data/conditional_scores/loss.bin

exit codes: 0 done, 2 bad usage, 3 bad data, 85 stopped by a signal. Started again, it continues."""
STOPPED = 85


def build_parser() -> Program:
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
    source = parser.add_argument_group("sources")
    source.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=".npy, or raw fp16/fp32 (for example another store's loss.bin); may be repeated. `loss` is presented to scorers as reference_loss",
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
    context = parser.add_argument_group(
        "context the tokens were (or will be) scored in; kept in the manifest, compared with training"
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
    model = parser.add_argument_group("with --huggingface")
    model.add_argument(
        "--columns", default="loss", help="loss, or loss,entropy (default: %(default)s)"
    )
    model.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 rounds the logits, which moves 0.5 to 4 %% of the selection",
    )
    model.add_argument(
        "--device", default="cpu", help="torch device, for example cuda:0 (default: %(default)s)"
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
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(argv)
    try:
        columns = _columns(options)
        _refuse_unused(options)
        job_slice = parse_job_slice(options.shard)
    except ValueError as error:
        print(f"import_scores: {error}", file=sys.stderr)
        return 2
    sentence = "import_scores: stopped; finished shards are kept, and the same command continues"
    with StopSignals(sentence, on_request=_leave):
        return _import(options, argv, columns, job_slice)


def _leave() -> None:
    raise SystemExit(STOPPED)  # finished shards are on disk, and the unfinished one is redone


def _import(
    options: argparse.Namespace,
    argv: list[str],
    columns: tuple[str, ...],
    job_slice: tuple[int, int],
) -> int:
    """Fill the store with this job's share and say what it holds; the exit code."""
    try:
        corpus = check_corpus(options.corpus)
        store = ScoreStore.create(options.output, _manifest(options, argv, corpus, columns))
        pending = pending_shards(store, job_slice)
        if pending:
            _fill(store, options, corpus, job_slice)
        state = ("" if pending else "done before, ") + finish(store)
        described = means(store)
    except (ValueError, OSError) as error:
        print(f"import_scores: {error}", file=sys.stderr)
        return 3
    print(f"{options.output}: {state}")
    print(f"{options.output}: {described}")
    return 0


def _columns(options: argparse.Namespace) -> tuple[str, ...]:
    if sum((bool(options.column), options.jsonl is not None, options.huggingface is not None)) != 1:
        raise ValueError(
            "give exactly one source: --column NAME=FILE (one or more), --jsonl FILE or --huggingface FOLDER"
        )
    if options.column:
        if bad := [pair for pair in options.column if not all(pair.partition("=")[::2])]:
            raise ValueError(f"--column {bad[0]}: expected NAME=FILE")
        return tuple(pair.partition("=")[0] for pair in options.column)
    columns = ("loss",) if options.jsonl else column_names(options.columns)
    if "loss" not in columns or set(columns) - {"loss", "entropy"}:
        raise ValueError(f"--columns {options.columns}: expected loss, or loss,entropy")
    return columns


def _refuse_unused(options: argparse.Namespace) -> None:
    """ValueError when an option is given that the chosen source does not read."""
    belongs = {
        "key": "jsonl",
        **dict.fromkeys(
            ("columns", "precision", "device", "micro_batch_size", "shard"), "huggingface"
        ),
    }
    unused = [
        name
        for name, source in belongs.items()
        if not getattr(options, source)
        and getattr(options, name) != build_parser().get_default(name)
    ]
    if unused:
        raise ValueError(
            "; ".join(
                f"--{name.replace('_', '-')} goes with --{belongs[name]} only, leave it out"
                for name in unused
            )
        )


def _manifest(
    options: argparse.Namespace, argv: list[str], corpus: CorpusManifest, columns: tuple[str, ...]
) -> ScoreManifest:
    from megatron_slm.scoring.foreign_model import huggingface_fingerprint

    files = [pair.partition("=")[2] for pair in options.column] or [
        options.jsonl or options.huggingface
    ]
    if options.huggingface:
        fingerprint = huggingface_fingerprint(options.huggingface)
    else:
        fingerprint = ",".join("sha256:" + file_sha256(path) for path in files)
    return ScoreManifest(
        corpus_fingerprint=corpus.fingerprint,
        corpus_tokens=corpus.tokens,
        corpus_documents=corpus.documents,
        tokenizer_fingerprint=corpus.tokenizer["fingerprint"],
        reference_fingerprint=fingerprint,
        reference_description=options.description or ", ".join(str(Path(path)) for path in files),
        window_tokens=options.window_tokens,
        stride_tokens=options.stride_tokens or options.window_tokens,
        document_policy=options.document_policy,
        shard_tokens=options.shard_tokens or default_shard_tokens(corpus.tokens),
        dtype=options.dtype,
        columns=columns,
        resume_command=f"python -m megatron_slm.import_scores {shlex.join(resume_command(argv))}",
    )


def _fill(
    store: ScoreStore,
    options: argparse.Namespace,
    corpus: CorpusManifest,
    job_slice: tuple[int, int],
) -> None:
    from megatron_slm.scoring import importers
    from megatron_slm.scoring.corpus import TokenStream, score_corpus

    stream = TokenStream(options.corpus)
    if options.column:
        arrays = {
            name: importers.read_array(path, corpus.tokens)
            for name, _, path in (pair.partition("=") for pair in options.column)
        }
        importers.import_arrays(store, stream, arrays, show_progress=True)
    elif options.jsonl:
        importers.import_jsonl(store, stream, options.jsonl, key=options.key, show_progress=True)
    else:
        runner = importers.transformers_runner(
            options.huggingface,
            stream,
            stream.plan(store.manifest),
            store.columns,
            micro_batch_size=options.micro_batch_size,
            vocabulary_size=corpus.tokenizer["vocabulary_size"],
            precision=options.precision,
            device=options.device,
        )
        score_corpus(runner, store, job_slice=job_slice, show_progress=True)


if __name__ == "__main__":
    sys.exit(main())
