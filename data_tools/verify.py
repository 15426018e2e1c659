"""Check a corpus from end to end.

    python -m data_tools.verify data/corpus

reads every byte of data/corpus.bin and .idx and says what is wrong: structure and sizes, checksums,
ids outside the vocabulary, documents without their closing token, disagreement with the manifest;
then decodes a sample of documents back to text.

    python -m data_tools.verify data/corpus --scores data/scores

also checks a score store: every byte against its markers, coverage, the corpus and tokenizer it
belongs to. To score some of it again with the reference: python -m megatron_slm.check_scores

For a corpus that another tool wrote, `--write-manifest --tokenizer P.model` checks what can be
checked without a manifest and writes one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from data_tools.corpus_arguments import add_corpus, add_tokenizer_of_corpus
from data_tools.corpus_checks import (
    TokenCounts,
    count_tokens,
    decode_sample,
    find_tokenizer,
    manifest_of_foreign_corpus,
    problems_of_tokens,
)
from data_tools.reading.documents import InputDataError
from data_tools.stored_scores import problems_of_scores
from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count, NotNegative
from megatron_slm.data.indexed import CorpusIndex, open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus, manifest_path
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import load_tokenizer


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 the corpus is sound, 2 wrong usage, 3 something is wrong with it.",
    )
    add_corpus(parser)
    add_tokenizer_of_corpus(parser)
    parser.add_argument(
        "--sample-documents",
        type=number_in(Count),
        default=3,
        metavar="N",
        help="how many to decode (default: %(default)s)",
    )
    parser.add_argument(
        "--write-manifest", action="store_true", help="make a manifest for a corpus that has none"
    )
    parser.add_argument(
        "--scores", metavar="S", help="a score store of this corpus, checked as well"
    )
    _add_deprecated(parser.add_argument_group("deprecated (use megatron_slm.check_scores)"))
    return parser


def _add_deprecated(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rescore",
        type=number_in(Count),
        default=0,
        metavar="N",
        help="with --scores: score N random windows again and compare",
    )
    group.add_argument(
        "--reference",
        metavar="RUN",
        help="with --rescore: the reference's checkpoint or Hugging Face folder",
    )
    group.add_argument(
        "--rescore-tolerance-nats",
        type=number_in(NotNegative),
        default=0.05,
        metavar="X",
        help="largest difference allowed (default: %(default)s)",
    )


def verify(arguments: argparse.Namespace) -> list[str]:
    """All problems found; empty for a sound corpus.

    Raises ValueError or InputDataError for a corpus that is too damaged to read on.
    """
    prefix = arguments.prefix
    console = Console()
    manifest = _manifest_to_check(arguments)
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    tokenizer = find_tokenizer(prefix, manifest, arguments.tokenizer)
    counts = count_tokens(tokens, index, manifest.tokenizer["eod_id"])
    if problems := problems_of_tokens(prefix, manifest, counts):
        return problems
    if arguments.write_manifest:
        manifest.write(prefix)
        console.print(f"wrote {manifest_path(prefix)}", highlight=False)
    _print_counts(prefix, manifest, index, counts, console)
    if tokenizer is None:
        console.print(
            f"note: {manifest.tokenizer['path']} is gone; give --tokenizer to see text",
            highlight=False,
        )
    else:
        for number, text in decode_sample(tokens, index, tokenizer, arguments.sample_documents):
            console.print(f"document {number}: {text[:200]!r}", highlight=False, markup=False)
    if not arguments.scores:
        return []
    problems = problems_of_scores(arguments.scores, manifest, index, console)
    if not problems and arguments.rescore:
        problems = _rescore(arguments)
    return problems


def _manifest_to_check(arguments: argparse.Namespace) -> CorpusManifest:
    """The corpus's manifest, its checksums compared; with --write-manifest the one to write."""
    prefix = arguments.prefix
    if not arguments.write_manifest:
        # A full check does not trust the stamp of an earlier one.
        Path(f"{prefix}.verified.json").unlink(missing_ok=True)
        return check_corpus(prefix)
    if manifest_path(prefix).exists():
        raise ValueError(
            f"{manifest_path(prefix)} exists already; delete it if the corpus was really made anew"
        )
    if arguments.tokenizer is None:
        raise ValueError(
            "--write-manifest needs --tokenizer P.model: the manifest names the tokenizer"
        )
    return manifest_of_foreign_corpus(prefix, load_tokenizer(arguments.tokenizer))


def _print_counts(
    prefix: str,
    manifest: CorpusManifest,
    index: CorpusIndex,
    counts: TokenCounts,
    console: Console,
) -> None:
    console.print(
        f"{prefix}: sound. {manifest.documents:,} documents, {manifest.tokens:,} tokens "
        f"({manifest.token_dtype}), ids 0 to {counts.largest_id} of "
        f"{manifest.tokenizer['vocabulary_size']}",
        highlight=False,
    )
    inside = counts.eod_tokens - (index.documents - counts.documents_not_closed)
    if inside > 0:
        console.print(
            f"note: the end-of-document id also occurs {inside} times inside documents",
            highlight=False,
        )


def _rescore(arguments: argparse.Namespace) -> list[str]:
    """The findings of megatron_slm.check_scores, which loads torch and the reference."""
    from megatron_slm.check_scores import rescore_windows

    return rescore_windows(
        arguments.prefix,
        arguments.scores,
        arguments.reference,
        arguments.rescore,
        arguments.rescore_tolerance_nats,
    )


def _deprecation(arguments: argparse.Namespace) -> str:
    return (
        "--rescore is now a program of its own and will leave verify in the next version: "
        f"python -m megatron_slm.check_scores --corpus {arguments.prefix} "
        f"--scores {arguments.scores} --reference {arguments.reference} "
        f"--windows {arguments.rescore}"
    )


@says_missing_extra("verify")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.rescore:
        if not (arguments.scores and arguments.reference):
            print(
                "verify: --rescore needs --scores S and --reference RUN, the model that made them",
                file=sys.stderr,
            )
            return 2
        print(f"verify: {_deprecation(arguments)}", file=sys.stderr)
    try:
        problems = verify(arguments)
    except (ValueError, InputDataError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"verify: {problem}", file=sys.stderr)
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
