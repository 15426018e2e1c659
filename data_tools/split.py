"""Hold out a share of a corpus's documents, chosen by a hash of their tokens.

    python -m data_tools.split data/corpus --held-out-fraction 0.01 --output-prefix data/split

writes data/split_train and data/split_held_out. The same document always falls on the same side, in whatever corpus, order or
shard it appears, and so do all its copies: no text is in both. Another `--seed` makes another choice.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_tools.corpus_files import CorpusCopy
from megatron_slm import __version__
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus

_STEP_DOCUMENTS = 4096


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.split", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="C", help="the corpus, without .bin")
    parser.add_argument("--held-out-fraction", type=float, required=True, metavar="X", help="share of documents, 0 < X < 1")
    parser.add_argument("--output-prefix", required=True, metavar="D", help="writes D_train and D_held_out")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace corpora under the output prefixes")
    return parser


def is_held_out(tokens: bytes, seed: int, fraction: float) -> bool:
    """Whether the document with these tokens is held out: a function of content, seed and fraction alone. A document held out
    at a small fraction stays held out at a larger one."""
    digest = hashlib.blake2b(tokens, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") < int(fraction * 2**64)


def split(prefix: str, output_prefix: str, fraction: float, seed: int = 0, *,
          overwrite: bool = False) -> tuple[CorpusManifest, CorpusManifest]:
    """Write both parts; returns their manifests (train, held out). Raises ValueError with a sentence."""
    if not 0 < fraction < 1:
        raise ValueError(f"--held-out-fraction {fraction}: a share between 0 and 1, such as 0.01")
    manifest = check_corpus(prefix)
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    starts_tokens = index.document_starts_tokens()
    with ExitStack() as stack:
        sides = [stack.enter_context(CorpusCopy(f"{output_prefix}_{name}", index.dtype, overwrite=overwrite))
                 for name in ("train", "held_out")]
        progress = stack.enter_context(Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()))
        for first in progress.track(range(0, index.documents, _STEP_DOCUMENTS), description="splitting"):
            bounds = starts_tokens[first:first + _STEP_DOCUMENTS + 1]
            held_out = np.array([is_held_out(tokens[start:end].tobytes(), seed, fraction)
                                 for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist())], bool)
            _append(sides, tokens, bounds, held_out)
        if not all(side.documents for side in sides):
            raise ValueError(f"{prefix}: with {index.documents} documents a share of {fraction} leaves one side empty")
        history = {"sources": [{"input": str(prefix), "fingerprint": manifest.fingerprint}],
                   "rejected": {"records": 0, "reasons": {}},
                   "created_by": {"program": "data_tools.split", "version": __version__, "held_out_fraction": fraction,
                                  "seed": seed}}
        return sides[0].finish(manifest, **history), sides[1].finish(manifest, **history)


def _append(sides: list[CorpusCopy], tokens: np.ndarray, bounds: np.ndarray, held_out: np.ndarray) -> None:
    """Give each run of documents of one side to that side in one piece."""
    changes = np.flatnonzero(np.diff(held_out)) + 1
    for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(held_out)]):
        side = sides[int(held_out[start])]
        side.add_bytes(memoryview(tokens[bounds[start]:bounds[end]]).cast("B"))
        side.add_lengths(np.diff(bounds[start:end + 1]))


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        Path(arguments.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        train, held_out = split(arguments.prefix, arguments.output_prefix, arguments.held_out_fraction, arguments.seed,
                                overwrite=arguments.overwrite)
    except ValueError as error:
        print(f"split: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"split: {error}. Nothing incomplete was published.", file=sys.stderr)
        return 4
    print(f"{arguments.output_prefix}_train: {train.documents:,} documents, {train.tokens:,} tokens; "
          f"{arguments.output_prefix}_held_out: {held_out.documents:,} documents, {held_out.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
