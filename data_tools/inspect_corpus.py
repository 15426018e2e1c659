"""Look into a corpus: its documents as text, its numbers, the lengths of its documents.

    python -m data_tools.inspect_corpus data/corpus

prints numbers of every source and a histogram of the lengths. With

    --document 0 17                        these documents as text
    --document 0 --tokens                  token by token
    --document 7 --scores data/scores      the text with its scores
    --json                                 the numbers for a program
    --picture lengths.png                  the histogram of every source as a picture
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_tools.corpus_arguments import add_corpus, add_tokenizer_of_corpus
from data_tools.corpus_checks import find_tokenizer
from data_tools.stored_scores import show_scored_text, show_scored_tokens
from data_tools.writing.statistics_report import length_summary, read_statistics
from megatron_slm.config.arguments import Program
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import CorpusIndex, open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import Tokenizer


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.inspect_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus(parser)
    add_tokenizer_of_corpus(parser)
    parser.add_argument(
        "--document",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="show these documents; -1 is the last",
    )
    parser.add_argument(
        "--tokens", action="store_true", help="show documents token by token, with ids"
    )
    parser.add_argument(
        "--scores",
        metavar="S",
        help="a score store of this corpus: documents are shown with their scores",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=2000,
        metavar="N",
        help="of each document shown (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--picture", metavar="F.png", help="draw the length histograms")
    return parser


def statistics_of_corpus(
    prefix: str, manifest: CorpusManifest, index: CorpusIndex
) -> dict[str, Any]:
    """PREFIX.statistics.json; without one that belongs to the corpus, what the index alone
    gives.
    """
    if (statistics := read_statistics(prefix, manifest)) is not None:
        return statistics
    lengths_tokens = np.diff(index.document_starts_tokens())
    total = {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "bytes_per_token": None,
        "document_tokens": length_summary(lengths_tokens),
    }
    return {"sources": [], "total": total}


def print_numbers(
    prefix: str, manifest: CorpusManifest, statistics: dict[str, Any], console: Console
) -> None:
    policy = "closed by the end-of-document token" if manifest.append_eod else "not closed"
    console.print(
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens "
        f"({manifest.token_dtype}), documents {policy}; vocabulary {manifest.tokenizer['path']}",
        highlight=False,
    )
    table = Table()
    table.add_column("source", no_wrap=True, max_width=40)
    for name in ("documents", "tokens", "bytes per token", "median", "90 %", "99 %", "longest"):
        table.add_column(name, justify="right")
    for row in statistics["sources"] + [{"source": "all", **statistics["total"]}]:
        quantiles = row["document_tokens"]["quantiles"]
        ratio = row["bytes_per_token"]
        table.add_row(
            row["source"],
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            f"{ratio:.2f}" if ratio else "–",
            *(f"{quantiles.get(name, 0):,}" for name in ("0.5", "0.9", "0.99", "1")),
        )
    console.print(table)
    bins = statistics["total"]["document_tokens"]["histogram_log2"]
    for power, count in enumerate(bins):
        if count:
            console.print(
                f"{2**power:>10,} to {2 ** (power + 1) - 1:>10,} tokens {count:>12,} "
                f"{'█' * max(1, round(40 * count / max(bins)))}",
                highlight=False,
            )


def draw_lengths(path: str, statistics: dict[str, Any]) -> None:
    """Draw the share of documents over their length in tokens, counted in powers of two.

    Each source has a line of its own.
    """
    from megatron_slm.analysis.style import colour, dash, house_style, new_figure, short_count

    counted = [
        (row["source"], np.array(row["document_tokens"]["histogram_log2"], float))
        for row in statistics["sources"] or [{"source": "all", **statistics["total"]}]
    ]
    counted = [(source, bins) for source, bins in counted if bins.sum()]
    with house_style():
        figure, (axes,) = new_figure()
        for number, (source, bins) in enumerate(counted):
            axes.stairs(
                100 * bins / bins.sum(),
                2.0 ** np.arange(len(bins) + 1),
                label=f"{source[-50:]} ({short_count(bins.sum())} documents)",
                color=colour(number),
                linestyle=dash(number),
                linewidth=1.8,
                fill=len(counted) == 1,
                alpha=0.6 if len(counted) == 1 else None,
            )
        first = min((int(np.flatnonzero(bins)[0]) for _, bins in counted), default=0)
        axes.set_xscale("log", base=2)
        axes.set(
            title="How long documents are",
            xlabel="tokens of a document",
            ylabel="documents (%)",
            xlim=(2.0**first, None),
            ylim=(0, None),
        )
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        axes.legend()
        figure.savefig(path, dpi=150)


class DocumentViewer:
    """Prints documents of one corpus: as text, token by token, or with their scores."""

    def __init__(
        self,
        tokens: FileArray,
        index: CorpusIndex,
        tokenizer: Tokenizer,
        scores: ScoreStore | None,
        console: Console,
    ) -> None:
        self._tokens = tokens
        self._starts_tokens = index.document_starts_tokens()
        self._documents = index.documents
        self._tokenizer = tokenizer
        self._scores = scores
        self._console = console

    def show(self, number: int, *, by_token: bool, max_tokens: int) -> None:
        """Print a document, counted from the end when `number` is negative.

        Raises ValueError when there is none.
        """
        if number < 0:
            number += self._documents
        if not 0 <= number < self._documents:
            raise ValueError(
                f"--document {number}: the corpus has documents 0 to {self._documents - 1}"
            )
        start, end = map(int, self._starts_tokens[number : number + 2])
        ids = self._tokens[start : min(end, start + max_tokens)]
        self._console.rule(f"document {number}: tokens {start:,} to {end:,}", align="left")
        if self._scores is not None:
            show = show_scored_tokens if by_token else show_scored_text
            show(self._scores, start, ids, self._tokenizer, self._console)
        elif by_token:
            self._show_tokens(start, ids)
        else:
            text = self._tokenizer.decode(ids[ids != self._tokenizer.eod_id])
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        if end - start > max_tokens:
            left_tokens = end - start - max_tokens
            self._console.print(f"… {left_tokens:,} more tokens (--max-tokens)", markup=False)

    def _show_tokens(self, start: int, ids: np.ndarray) -> None:
        for offset, token_id in enumerate(ids.tolist(), start=start):
            self._console.print(
                f"{offset:>12} {token_id:>7} {self._tokenizer.piece(token_id)!r}",
                markup=False,
                highlight=False,
            )


def inspect(arguments: argparse.Namespace) -> None:
    """Show what the arguments select. Raises ValueError with a message."""
    prefix = arguments.prefix
    if arguments.tokens and not arguments.document:
        raise ValueError("--tokens shows documents: say which with --document N")
    if arguments.max_tokens < 1:
        raise ValueError(f"--max-tokens {arguments.max_tokens}: at least 1")
    manifest = CorpusManifest.read(prefix)
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    statistics = statistics_of_corpus(prefix, manifest, index)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if arguments.picture:
        draw_lengths(arguments.picture, statistics)
    if arguments.json:
        print(json.dumps({"manifest": manifest.to_json(), "statistics": statistics}, indent=2))
    elif not arguments.document:
        print_numbers(prefix, manifest, statistics, console)
    scores = open_scores(arguments, manifest)
    if arguments.document:
        tokenizer = find_tokenizer(prefix, manifest, arguments.tokenizer)
        if tokenizer is None:
            raise ValueError(
                f"{manifest.tokenizer['path']} is gone; give --tokenizer P.model to see text"
            )
        viewer = DocumentViewer(tokens, index, tokenizer, scores, console)
        for number in arguments.document:
            viewer.show(number, by_token=arguments.tokens, max_tokens=arguments.max_tokens)


def open_scores(arguments: argparse.Namespace, manifest: CorpusManifest) -> ScoreStore | None:
    """The store named by --scores, checked to be of this corpus; None without --scores.

    An unfinished store is shown as far as it goes.
    """
    if arguments.scores is None:
        return None
    if not arguments.document:
        raise ValueError("--scores shows documents with their scores: say which with --document N")
    scores = ScoreStore.open(arguments.scores, allow_missing_scores=True)
    scores.check_against(manifest)
    return scores


@says_missing_extra("inspect_corpus")
def main(argv: list[str] | None = None) -> int:
    try:
        inspect(build_parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"inspect_corpus: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
