"""Hold out a share of a corpus's documents, chosen by a hash of their tokens.

    python -m data_tools.split data/corpus --held-out-fraction 0.01 --output-prefix data/split

writes data/split_train and data/split_held_out. The same document always falls on the same side, in
whatever corpus, order or shard it appears, and so do all its copies: no text is in both. Another
`--seed` makes another choice.

    python -m data_tools.split data/corpus --held-out-fraction 0.01 --output-prefix data/split \\
        --scores data/corpus_scores

also takes the scores of every document along: data/split_train.corpus_scores and
data/split_held_out.corpus_scores.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_tools.corpus_arguments import add_corpus
from data_tools.writing.corpus_files import CorpusCopy, finished_before
from data_tools.writing.split_scores import carried_before, carry_scores, open_scores
from megatron_slm import __version__
from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import CorpusIndex, open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus, manifest_path
from megatron_slm.installation import says_missing_extra

PROGRAM = "data_tools.split"
_STEP_DOCUMENTS = 4096
_COPY_TOKENS = 4 << 20
TokenRange = tuple[int, int]
"""[start, end) in the tokens of the whole corpus."""


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus(parser)
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        required=True,
        metavar="X",
        help="share of documents, 0 < X < 1",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="D", help="writes D_train and D_held_out"
    )
    parser.add_argument("--seed", type=number_in(Count), default=0, help="default: %(default)s")
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="S",
        help="score stores of the corpus, split along with it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace corpora under the output prefixes"
    )
    return parser


def is_held_out(tokens: bytes, seed: int, fraction: float) -> bool:
    """Whether the document with these tokens is held out.

    It depends on the tokens, the seed and the fraction alone. A document that is held out at a
    small fraction is held out at a larger one too.
    """
    digest = hashlib.blake2b(
        tokens, digest_size=8, key=seed.to_bytes(8, "little", signed=True)
    ).digest()
    return int.from_bytes(digest, "little") < int(fraction * 2**64)


def split(
    prefix: str,
    output_prefix: str,
    fraction: float,
    seed: int = 0,
    *,
    overwrite: bool = False,
    scores: list[str] | None = None,
) -> tuple[CorpusManifest, CorpusManifest]:
    """Write both parts, and those of every score store in `scores`.

    Returns the manifests (train, held out). Raises ValueError with a sentence.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--held-out-fraction {fraction}: a share between 0 and 1, such as 0.01")
    manifest = check_corpus(prefix)
    train_prefix = f"{output_prefix}_train"
    held_out_prefix = f"{output_prefix}_held_out"
    prefixes = [train_prefix, held_out_prefix]
    if not overwrite and (
        finished := _finished_before(prefixes, manifest, fraction, seed, scores or [])
    ):
        return finished
    stores = open_scores(scores or [], manifest, prefixes)
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    with ExitStack() as stack:
        # A part that exists, and was not refused, is one that an earlier call, killed before the
        # other part was there, has made.
        train, held_out = (
            stack.enter_context(
                CorpusCopy(part, index.dtype, overwrite=overwrite or manifest_path(part).exists())
            )
            for part in prefixes
        )
        train_ranges, held_out_ranges = _copy_documents(
            tokens, index, train, held_out, seed=seed, fraction=fraction
        )
        if not train_ranges or not held_out_ranges:
            raise ValueError(
                f"{prefix}: with {index.documents} documents a share of {fraction} leaves one "
                "side empty"
            )
        history = {
            "sources": [{"input": str(prefix), "fingerprint": manifest.fingerprint}],
            "rejected": {"records": 0, "reasons": {}},
            "created_by": {
                "program": PROGRAM,
                "version": __version__,
                "held_out_fraction": fraction,
                "seed": seed,
            },
        }
        parts = train.finish(manifest, **history), held_out.finish(manifest, **history)
    for store in stores:
        carry_scores(store, train_prefix, parts[0], np.array(train_ranges, np.int64))
        carry_scores(store, held_out_prefix, parts[1], np.array(held_out_ranges, np.int64))
    return parts


def _copy_documents(
    tokens: FileArray,
    index: CorpusIndex,
    train: CorpusCopy,
    held_out: CorpusCopy,
    *,
    seed: int,
    fraction: float,
) -> tuple[list[TokenRange], list[TokenRange]]:
    """Give every document to its side; returns the ranges of tokens that each side was given."""
    train_ranges: list[TokenRange] = []
    held_out_ranges: list[TokenRange] = []
    starts_tokens = index.document_starts_tokens()
    steps = range(0, index.documents, _STEP_DOCUMENTS)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for first in progress.track(steps, description="splitting"):
            bounds = starts_tokens[first : first + _STEP_DOCUMENTS + 1]
            chosen = np.array(
                [
                    is_held_out(tokens[start:end].tobytes(), seed, fraction)
                    for start, end in pairwise(bounds.tolist())
                ],
                bool,
            )
            for start, end in _runs(chosen):
                token_range = (int(bounds[start]), int(bounds[end]))
                if chosen[start]:
                    _append(held_out, tokens, bounds[start : end + 1])
                    held_out_ranges.append(token_range)
                else:
                    _append(train, tokens, bounds[start : end + 1])
                    train_ranges.append(token_range)
    return train_ranges, held_out_ranges


def _finished_before(
    prefixes: list[str], manifest: CorpusManifest, fraction: float, seed: int, scores: list[str]
) -> tuple[CorpusManifest, CorpusManifest] | None:
    """Both parts, with all their scores, when an earlier call has made them in the same way.

    None when a part or its scores are missing. Raises ValueError when they were made from something
    else.
    """
    now = {"corpus": manifest.fingerprint, "held_out_fraction": fraction, "seed": seed}
    train, held_out = (finished_before(prefix, PROGRAM, _made_from, now) for prefix in prefixes)
    if train is None or held_out is None:
        return None
    for folder in scores:
        for prefix, part in zip(prefixes, (train, held_out), strict=True):
            if not carried_before(folder, prefix, part):
                return None
    print("done before, from the same corpus and options:")
    return train, held_out


def _made_from(part: CorpusManifest) -> dict[str, Any]:
    return {
        "corpus": part.sources[0]["fingerprint"],
        "held_out_fraction": part.created_by["held_out_fraction"],
        "seed": part.created_by["seed"],
    }


def _runs(held_out: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of consecutive documents that go to one side."""
    changes = np.flatnonzero(np.diff(held_out)) + 1
    return list(pairwise([0, *changes.tolist(), len(held_out)]))


def _append(side: CorpusCopy, tokens: FileArray, bounds: np.ndarray) -> None:
    """Give consecutive documents to a side, in pieces of bounded size."""
    for start in range(int(bounds[0]), int(bounds[-1]), _COPY_TOKENS):
        side.add_bytes(tokens[start : min(start + _COPY_TOKENS, int(bounds[-1]))].tobytes())
    side.add_lengths(np.diff(bounds))


@says_missing_extra("split")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        Path(arguments.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        train, held_out = split(
            arguments.prefix,
            arguments.output_prefix,
            arguments.held_out_fraction,
            arguments.seed,
            overwrite=arguments.overwrite,
            scores=arguments.scores,
        )
    except ValueError as error:
        print(f"split: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"split: {error}. Nothing incomplete was published.", file=sys.stderr)
        return 4
    print(
        f"{arguments.output_prefix}_train: {train.documents:,} documents, {train.tokens:,} tokens; "
        f"{arguments.output_prefix}_held_out: {held_out.documents:,} documents, "
        f"{held_out.tokens:,} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
