"""How well does a vocabulary fit a text? And a second one?

    python -m tokenizer.evaluate --tokenizer code.model --input src/ prose.jsonl \\
        --against llama/tokenizer.json --picture fit.png

prints, for each source: bytes per token (more of them make shorter sequences), tokens per word, the
share of unknown tokens, the share of tokens that spell single bytes, the share of the vocabulary in
use, and how many documents do not come back exactly.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_tools.reading.arguments import add_record_arguments
from data_tools.reading.documents import InputDataError, text_bytes
from data_tools.reading.read import read_documents
from megatron_slm.config.arguments import Program
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.installation import require, says_missing_extra
from megatron_slm.tokenization import Tokenizer, VocabularyFileError, load_tokenizer
from tokenizer.round_trip import round_trip_failures

_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass
class Fit:
    """Counts of one tokenizer on one source; ratios are taken once, at the end."""

    documents: int = 0
    text_bytes: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0
    byte_tokens: int = 0
    round_trip_failures: int = 0
    used: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def to_json(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "words": self.words,
            "tokens": self.tokens,
            "bytes_per_token": self.text_bytes / max(self.tokens, 1),
            "tokens_per_word": self.tokens / max(self.words, 1),
            "unknown_fraction": self.unknown / max(self.tokens, 1),
            "byte_token_fraction": self.byte_tokens / max(self.tokens, 1),
            "vocabulary_used_fraction": float(self.used.mean()),
            "round_trip_failures": self.round_trip_failures,
        }


def build_parser() -> Program:
    parser = Program(
        prog="python -m tokenizer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="P.model",
        help="SentencePiece .model or tokenizer.json",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="P.model",
        help="further vocabularies to compare with",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="F", help="each argument is one source"
    )
    add_record_arguments(parser)
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=20_000_000,
        metavar="N",
        help="of each source (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="F.json", help="write the numbers here")
    parser.add_argument(
        "--picture", metavar="F.png", help="draw bytes per token by source and vocabulary"
    )
    return parser


def byte_ids(tokenizer: Tokenizer) -> np.ndarray:
    """bool of the vocabulary: which ids stand for a single byte for want of a better piece.

    SentencePiece marks its fallback bytes. The ids of a byte-level vocabulary that are no whole
    character decode to U+FFFD.
    """
    ids = range(tokenizer.vocabulary_size)
    if tokenizer.kind == "sentencepiece":
        return np.array([tokenizer.backend.is_byte(token_id) for token_id in ids])
    decoded = [tokenizer.backend.decode([i], skip_special_tokens=False) for i in ids]
    return np.array(["\ufffd" in text for text in decoded])


def measure(
    tokenizers: dict[str, Tokenizer], arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, Fit]], Counter]:
    """Fit of each tokenizer on each source, and the records left out."""
    is_byte = {name: byte_ids(tokenizer) for name, tokenizer in tokenizers.items()}
    fits: dict[str, dict[str, Fit]] = {}
    rejects: Counter = Counter()
    for source in arguments.input:
        fits[source] = {
            name: Fit(used=np.zeros(tokenizer.vocabulary_size, bool))
            for name, tokenizer in tokenizers.items()
        }
        seen_bytes = 0
        for document in read_documents(
            [source], arguments.text_key, include=arguments.include, rejects=rejects
        ):
            size_bytes = text_bytes(document.text)
            words = len(_WORD.findall(document.text))
            for name, tokenizer in tokenizers.items():
                _add(fits[source][name], tokenizer, is_byte[name], document.text, size_bytes, words)
            seen_bytes += size_bytes
            if seen_bytes >= arguments.max_bytes:
                break
        if not seen_bytes:
            raise InputDataError(
                f"{source}: no usable text ({dict(rejects) or 'the input is empty'})"
            )
    return fits, rejects


def _add(
    fit: Fit, tokenizer: Tokenizer, is_byte: np.ndarray, text: str, size_bytes: int, words: int
) -> None:
    ids = np.asarray(tokenizer.encode(text), np.int64)
    fit.documents += 1
    fit.text_bytes += size_bytes
    fit.words += words
    fit.tokens += len(ids)
    if tokenizer.unk_id is not None:
        fit.unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
    fit.byte_tokens += int(np.count_nonzero(is_byte[ids]))
    fit.round_trip_failures += len(round_trip_failures(tokenizer, [text]))
    fit.used[ids] = True


def report_of(
    tokenizers: dict[str, Tokenizer], fits: dict[str, dict[str, Fit]], rejects: Counter
) -> dict[str, Any]:
    """The numbers, for a program."""
    sources: dict[str, dict[str, Any]] = {}
    for source, of_source in fits.items():
        sources[source] = {name: fit.to_json() for name, fit in of_source.items()}
    fingerprints = {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()}
    return {"sources": sources, "fingerprints": fingerprints, "rejected": dict(rejects)}


def print_table(fits: dict[str, dict[str, Fit]], console: Console) -> None:
    table = Table()
    table.add_column("source", no_wrap=True)
    table.add_column("vocabulary", no_wrap=True)
    for name in (
        "documents",
        "bytes per token",
        "tokens per word",
        "unknown",
        "byte tokens",
        "vocabulary used",
        "not exact",
    ):
        table.add_column(name, justify="right")
    for source, of_source in fits.items():
        for name, fit in of_source.items():
            numbers = fit.to_json()
            table.add_row(
                source[-40:],
                name[-40:],
                f"{fit.documents:,}",
                f"{numbers['bytes_per_token']:.3f}",
                f"{numbers['tokens_per_word']:.3f}",
                f"{numbers['unknown_fraction']:.3%}",
                f"{numbers['byte_token_fraction']:.3%}",
                f"{numbers['vocabulary_used_fraction']:.1%}",
                f"{fit.round_trip_failures:,}",
            )
    console.print(table)


def draw_fits(path: str, fits: dict[str, dict[str, Fit]]) -> None:
    """Draw bytes per token, and the share of tokens that spell bytes, as bars grouped by source."""
    from megatron_slm.analysis.style import colour, house_style, new_figure

    names = list(next(iter(fits.values())))
    panels = (
        ("bytes_per_token", "bytes per token", "%.2f", 1),
        ("byte_token_fraction", "tokens that spell single bytes (%)", "%.1f", 100),
    )
    places = np.arange(len(fits))
    with house_style():
        figure, both = new_figure(len(panels))
        for axes, (key, title, label_format, factor) in zip(both, panels, strict=True):
            for number, name in enumerate(names):
                heights = [factor * of_source[name].to_json()[key] for of_source in fits.values()]
                bars = axes.bar(
                    places + number * 0.8 / len(names),
                    heights,
                    0.76 / len(names),
                    align="edge",
                    label=name[-50:],
                    color=colour(number),
                )
                axes.bar_label(bars, fmt=label_format, padding=2)
            axes.set(
                title=title, xticks=places + 0.4, xticklabels=[source[-30:] for source in fits]
            )
            axes.grid(axis="x", visible=False)
            axes.margins(y=0.12)
        figure.legend(
            *both[0].get_legend_handles_labels(), loc="outside lower left", ncols=min(len(names), 3)
        )
        figure.savefig(path, dpi=150)


@says_missing_extra("tokenizer.evaluate")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.picture:
        require("matplotlib")
    try:
        if arguments.max_bytes < 1:
            raise ValueError(f"--max-bytes {arguments.max_bytes}: at least 1")
        tokenizers = {
            path: load_tokenizer(path) for path in [arguments.tokenizer, *arguments.against]
        }
        fits, rejects = measure(tokenizers, arguments)
        if arguments.json:
            write_json_atomically(arguments.json, report_of(tokenizers, fits, rejects))
        if arguments.picture:
            draw_fits(arguments.picture, fits)
    except (InputDataError, VocabularyFileError) as error:
        print(f"tokenizer.evaluate: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"tokenizer.evaluate: {error}", file=sys.stderr)
        return 2
    print_table(fits, Console() if sys.stdout.isatty() else Console(width=160))
    if rejects:
        print("left out: " + ", ".join(f"{count} × {reason}" for reason, count in rejects.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
