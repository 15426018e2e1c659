"""Hold out a share of a corpus's documents, chosen by a hash of their tokens.

    python -m data_tools.split data/corpus --held-out-fraction 0.01 --output-prefix data/split

writes data/split_train and data/split_held_out. The same document always falls on the same side, in
whatever corpus, order or shard it appears, and so do all its copies: no text is in both. Another
`--seed` makes another choice.

    python -m data_tools.split data/corpus --held-out-fraction 0.01 --output-prefix data/split
    --scores data/corpus_scores

also takes the scores of every document along: data/split_train.corpus_scores and
data/split_held_out.corpus_scores.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_tools.writing.corpus_files import CorpusCopy, finished_before
from data_tools.writing.split_scores import carried_before, carry_scores, open_scores
from megatron_slm import __version__
from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus, manifest_path

PROGRAM = "data_tools.split"
_STEP_DOCUMENTS = 4096
_COPY_TOKENS = 4 << 20


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", metavar="C", help="the corpus, without .bin")
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
    """Whether the document with these tokens is held out: a function of content, seed and fraction
    alone. A document held out at a small fraction stays held out at a larger one."""
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
    """Write both parts, and those of every score store in `scores`; returns the manifests (train, held out). ValueError with a sentence."""
    if not 0 < fraction < 1:
        raise ValueError(f"--held-out-fraction {fraction}: a share between 0 and 1, such as 0.01")
    manifest = check_corpus(prefix)
    prefixes = [f"{output_prefix}_{name}" for name in ("train", "held_out")]
    if not overwrite and (
        finished := _finished_before(prefixes, manifest, fraction, seed, scores or [])
    ):
        return finished
    stores = open_scores(scores or [], manifest, prefixes)
    runs: tuple[list, list] = ([], [])
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    starts_tokens = index.document_starts_tokens()
    with ExitStack() as stack:
        # A part that is there, and was not refused, is what this call makes: an earlier one was killed before the rest.
        sides = [
            stack.enter_context(
                CorpusCopy(part, index.dtype, overwrite=overwrite or manifest_path(part).exists())
            )
            for part in prefixes
        ]
        progress = stack.enter_context(
            Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
        )
        for first in progress.track(
            range(0, index.documents, _STEP_DOCUMENTS), description="splitting"
        ):
            bounds = starts_tokens[first : first + _STEP_DOCUMENTS + 1]
            held_out = np.array(
                [
                    is_held_out(tokens[start:end].tobytes(), seed, fraction)
                    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
                ],
                bool,
            )
            for start, end in _runs(held_out):
                _append(sides[int(held_out[start])], tokens, bounds[start : end + 1])
                runs[int(held_out[start])].append((int(bounds[start]), int(bounds[end])))
        if not all(side.documents for side in sides):
            raise ValueError(
                f"{prefix}: with {index.documents} documents a share of {fraction} leaves one side empty"
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
        parts = sides[0].finish(manifest, **history), sides[1].finish(manifest, **history)
    for store in stores:
        for part_prefix, part, ranges in zip(prefixes, parts, runs, strict=True):
            carry_scores(store, part_prefix, part, np.array(ranges, np.int64))
    return parts


def _finished_before(
    prefixes: list[str], manifest: CorpusManifest, fraction: float, seed: int, scores: list[str]
) -> tuple[CorpusManifest, CorpusManifest] | None:
    """Both parts, with all their scores, when an earlier call made them in the same way; None when
    there are none.

    ValueError when they were made from something else.
    """
    now = {"corpus": manifest.fingerprint, "held_out_fraction": fraction, "seed": seed}
    parts = [finished_before(prefix, PROGRAM, _made_from, now) for prefix in prefixes]
    if None in parts or not all(
        carried_before(folder, prefix, part)
        for folder in scores
        for prefix, part in zip(prefixes, parts, strict=True)
    ):
        return None
    print("done before, from the same corpus and options:")
    return parts[0], parts[1]


def _made_from(part: CorpusManifest) -> dict[str, Any]:
    return {
        "corpus": part.sources[0]["fingerprint"],
        "held_out_fraction": part.created_by["held_out_fraction"],
        "seed": part.created_by["seed"],
    }


def _runs(held_out: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of documents in a row that go to one side."""
    changes = np.flatnonzero(np.diff(held_out)) + 1
    return list(zip([0, *changes.tolist()], [*changes.tolist(), len(held_out)], strict=True))


def _append(side: CorpusCopy, tokens: FileArray, bounds: np.ndarray) -> None:
    """Give documents in a row to a side, in pieces of bounded size."""
    for start in range(int(bounds[0]), int(bounds[-1]), _COPY_TOKENS):
        side.add_bytes(tokens[start : min(start + _COPY_TOKENS, int(bounds[-1]))].tobytes())
    side.add_lengths(np.diff(bounds))


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
        f"{arguments.output_prefix}_held_out: {held_out.documents:,} documents, {held_out.tokens:,} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
