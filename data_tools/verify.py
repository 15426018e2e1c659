"""Check a corpus from end to end.

    python -m data_tools.verify data/corpus

reads every byte of data/corpus.bin and .idx and says what is wrong: structure and sizes, checksums, ids outside the vocabulary,
documents without their closing token, disagreement with the manifest; then decodes a sample of documents back to text.

    python -m data_tools.verify data/corpus --scores data/scores --rescore 20 --reference runs/reference

also checks a score store: every byte against its markers, coverage, the corpus and tokenizer it belongs to; and scores 20 random
windows again with the reference.

For a corpus that another tool wrote, `--write-manifest --tokenizer P.model` checks what can be checked without a manifest and
writes one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_tools import score_checks
from data_tools.reading.documents import InputDataError
from megatron_slm import __version__
from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count, NotNegative
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import CorpusIndex, open_tokens, read_index
from megatron_slm.data.manifest import (
    FORMAT_VERSION,
    CorpusManifest,
    check_corpus,
    manifest_path,
)
from megatron_slm.files.hashing import file_sha256
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences

_PIECE_TOKENS = 8 << 20


@dataclass
class Findings:
    """What reading all tokens showed."""

    largest_id: int = -1
    smallest_id: int = 0
    closing_tokens: int = 0
    documents_not_begun: int = 0
    documents_not_closed: int = 0
    first_not_closed: int = -1
    empty_documents: int = 0
    problems: list[str] = field(default_factory=list)


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 the corpus is sound, 2 wrong usage, 3 something is wrong with it.",
    )
    parser.add_argument("prefix", metavar="C", help="the corpus, without .bin")
    parser.add_argument(
        "--tokenizer",
        metavar="P.model",
        help="its tokenizer, when it is no longer where the manifest says",
    )
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
    parser.add_argument(
        "--rescore",
        type=number_in(Count),
        default=0,
        metavar="N",
        help="with --scores: score N random windows again and compare",
    )
    parser.add_argument(
        "--reference",
        metavar="RUN",
        help="with --rescore: the reference's checkpoint or Hugging Face folder",
    )
    parser.add_argument(
        "--rescore-tolerance-nats",
        type=number_in(NotNegative),
        default=0.05,
        help="largest difference allowed (default: %(default)s)",
    )
    return parser


def read_tokens(
    tokens: FileArray, index: CorpusIndex, eod_id: int, bos_id: int | None = None
) -> Findings:
    """One pass over all tokens: id range, and whether documents begin with `bos_id` and end with `eod_id`."""
    findings = Findings()
    starts_tokens = index.document_starts_tokens()
    lengths_tokens = np.diff(starts_tokens)
    findings.empty_documents = int(np.count_nonzero(lengths_tokens == 0))
    first_places = starts_tokens[:-1][lengths_tokens > 0]
    last_places = starts_tokens[1:][lengths_tokens > 0] - 1
    pieces = range(0, len(tokens), _PIECE_TOKENS)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for start in progress.track(pieces, description="reading tokens"):
            piece = tokens[start : start + _PIECE_TOKENS]
            findings.largest_id = max(findings.largest_id, int(piece.max()))
            findings.smallest_id = min(findings.smallest_id, int(piece.min()))
            findings.closing_tokens += int(np.count_nonzero(piece == eod_id))
            low, high = np.searchsorted(first_places, (start, start + len(piece)))
            begins = piece[first_places[low:high] - start]
            findings.documents_not_begun += int(np.count_nonzero(begins != bos_id))
            low, high = np.searchsorted(last_places, (start, start + len(piece)))
            not_closed = low + np.flatnonzero(piece[last_places[low:high] - start] != eod_id)
            if len(not_closed) and not findings.documents_not_closed:
                findings.first_not_closed = int(not_closed[0])
            findings.documents_not_closed += len(not_closed)
    return findings


def problems_of(prefix: str, manifest: CorpusManifest, findings: Findings) -> list[str]:
    size, eod_id = manifest.tokenizer["vocabulary_size"], manifest.tokenizer["eod_id"]
    problems = []
    if findings.largest_id >= size or findings.smallest_id < 0:
        worst = findings.largest_id if findings.largest_id >= size else findings.smallest_id
        problems.append(
            f"{prefix}.bin holds the id {worst}, but the vocabulary has ids 0 to {size - 1}: it was made with another "
            "tokenizer, or with another token dtype"
        )
    if findings.empty_documents:
        problems.append(f"{findings.empty_documents} documents have no tokens")
    if manifest.append_eod and findings.documents_not_closed:
        problems.append(
            f"{findings.documents_not_closed} documents do not end with the end-of-document id {eod_id} (the first is "
            f"document {findings.first_not_closed}), though the manifest says append_eod"
        )
    return problems


def find_tokenizer(prefix: str, manifest: CorpusManifest, path: str | None) -> Tokenizer | None:
    """The corpus's tokenizer; None when the manifest's path is gone and none was given. Raises ValueError for another one."""
    if path is None and not Path(manifest.tokenizer["path"]).exists():
        return None
    tokenizer = load_tokenizer(path or manifest.tokenizer["path"])
    if differences := tokenizer_differences(tokenizer.entry, manifest.tokenizer):
        raise ValueError(
            f"{tokenizer.path} is not the tokenizer of {prefix}; it and the manifest say: {'; '.join(differences)}"
        )
    return tokenizer


def decode_sample(
    tokens: FileArray, index: CorpusIndex, tokenizer: Tokenizer, count: int
) -> list[tuple[int, str]]:
    """(document number, text) of `count` documents spread evenly. Raises InputDataError where decoding gives no text."""
    starts_tokens = index.document_starts_tokens()
    numbers = np.unique(
        np.linspace(0, index.documents - 1, min(count, index.documents)).astype(np.int64)
    ).tolist()
    sample = []
    for number in numbers:
        ids = tokens[
            starts_tokens[number] : min(starts_tokens[number + 1], starts_tokens[number] + 2000)
        ]
        ids = ids[
            (ids != tokenizer.eod_id)
            & (ids != (tokenizer.bos_id if tokenizer.bos_id is not None else -1))
        ]
        text = tokenizer.decode(ids)
        if len(ids) and not text:
            raise InputDataError(
                f"document {number} decodes to nothing: the tokens do not belong to this tokenizer"
            )
        sample.append((number, text))
    return sample


def manifest_for_foreign(prefix: str, tokenizer: Tokenizer) -> CorpusManifest:
    """A manifest for a .bin/.idx pair another tool wrote.

    How documents begin and end is read from the data.
    """
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    findings = read_tokens(tokens, index, tokenizer.eod_id, tokenizer.bos_id)
    return CorpusManifest(
        format_version=FORMAT_VERSION,
        documents=index.documents,
        tokens=index.tokens,
        token_dtype=index.dtype.name,
        bin_bytes=index.bin_bytes,
        idx_bytes=Path(f"{prefix}.idx").stat().st_size,
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        tokenizer=tokenizer.entry,
        append_eod=findings.documents_not_closed == 0 and index.documents > 0,
        prepend_bos=findings.documents_not_begun == 0 and index.documents > 0,
        sources=[{"input": "unknown"}],
        created_by={"program": "data_tools.verify", "version": __version__},
        rejected={"records": 0, "reasons": {}},
    )


def verify(arguments: argparse.Namespace) -> list[str]:
    """All problems found; empty for a sound corpus. Raises ValueError for a corpus too damaged to read on."""
    prefix = arguments.prefix.removesuffix(".bin").removesuffix(".idx")
    console = Console()
    if arguments.write_manifest:
        if manifest_path(prefix).exists():
            raise ValueError(
                f"{manifest_path(prefix)} exists already; delete it if the corpus was really made anew"
            )
        if arguments.tokenizer is None:
            raise ValueError(
                "--write-manifest needs --tokenizer P.model: the manifest names the tokenizer"
            )
        manifest = manifest_for_foreign(prefix, load_tokenizer(arguments.tokenizer))
    else:
        Path(f"{prefix}.verified.json").unlink(
            missing_ok=True
        )  # a full check does not trust an earlier one
        manifest = check_corpus(prefix)
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    tokenizer = find_tokenizer(prefix, manifest, arguments.tokenizer)
    findings = read_tokens(tokens, index, manifest.tokenizer["eod_id"])
    problems = problems_of(prefix, manifest, findings)
    if problems:
        return problems
    if arguments.write_manifest:
        manifest.write(prefix)
        console.print(f"wrote {manifest_path(prefix)}", highlight=False)
    console.print(
        f"{prefix}: sound. {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.token_dtype}), ids "
        f"0 to {findings.largest_id} of {manifest.tokenizer['vocabulary_size']}",
        highlight=False,
    )
    inside = findings.closing_tokens - (index.documents - findings.documents_not_closed)
    if inside > 0:
        console.print(
            f"note: the end-of-document id also occurs {inside} times inside documents",
            highlight=False,
        )
    if tokenizer is None:
        console.print(
            f"note: {manifest.tokenizer['path']} is gone; give --tokenizer to see text",
            highlight=False,
        )
    else:
        for number, text in decode_sample(tokens, index, tokenizer, arguments.sample_documents):
            console.print(f"document {number}: {text[:200]!r}", highlight=False, markup=False)
    return verify_scores(prefix, manifest, index, arguments, console) if arguments.scores else []


def verify_scores(
    prefix: str,
    manifest: CorpusManifest,
    index: CorpusIndex,
    arguments: argparse.Namespace,
    console: Console,
) -> list[str]:
    """Problems of the score store named by --scores, and of the windows scored again."""
    problems = score_checks.check_scores(arguments.scores, manifest, index, console)
    if not problems and arguments.rescore:
        problems = score_checks.rescore_windows(
            prefix,
            arguments.scores,
            arguments.reference,
            arguments.rescore,
            arguments.rescore_tolerance_nats,
            console,
        )
    return problems


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.rescore and not (arguments.scores and arguments.reference):
        print(
            "verify: --rescore needs --scores S and --reference RUN, the model that made them",
            file=sys.stderr,
        )
        return 2
    try:
        problems = verify(arguments)
    except (ValueError, InputDataError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"verify: {problem}", file=sys.stderr)
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
