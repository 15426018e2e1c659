"""Score random windows of a corpus again with the reference, and compare with what is stored."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal, cast

from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import NotNegative, Size
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.installation import says_missing_extra

DESCRIPTION = """Score random windows again with the reference, and compare with the stored scores.

Prints the largest difference of each column. The reference is a checkpoint of ours or a Hugging
Face folder, and must be the one that made the scores."""
EPILOG = """example:
  python -m megatron_slm.check_scores --corpus data/corpus --scores data/corpus_scores \\
      --reference runs/reference

exit codes: 0 the scores agree, 2 wrong usage, 3 they differ, or something cannot be opened or
belongs to something else. Every byte of a store is checked by: python -m data_tools.verify C
--scores S"""


def build_parser() -> Program:
    parser = Program(
        "check_scores",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", required=True, metavar="C", help="prefix of the corpus")
    parser.add_argument("--scores", required=True, metavar="S", help="a score store of this corpus")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="RUN",
        help="the reference's checkpoint or Hugging Face folder",
    )
    parser.add_argument(
        "--windows",
        type=number_in(Size),
        default=20,
        metavar="N",
        help="how many windows to score again (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance-nats",
        type=number_in(NotNegative),
        default=0.05,
        metavar="X",
        help="largest difference allowed (default: %(default)s)",
    )
    return parser


def rescore_windows(
    prefix: str, scores: str, reference: str, windows: int, tolerance_nats: float
) -> list[str]:
    """What is wrong with the stored scores of `windows` random windows: a sentence per column.

    Raises ValueError when the store, the corpus or the reference cannot be opened, or do not belong
    together.
    """
    store = ScoreStore.open(scores)
    store.check_against(CorpusManifest.read(prefix))
    is_huggingface = (Path(reference) / "config.json").is_file()
    score_again = _with_transformers if is_huggingface else _with_checkpoint
    worst_nats = score_again(store, prefix, reference, windows)
    listed = ", ".join(f"{column} {nats:.2g} nats" for column, nats in worst_nats.items())
    print(f"{windows} windows scored again: largest difference {listed}")
    return [
        f"{scores}: {column} differs by {nats:.3g} nats from what {reference} gives "
        f"(allowed: {tolerance_nats}); the scores are of another model or another context"
        for column, nats in worst_nats.items()
        if nats > tolerance_nats
    ]


def _with_transformers(
    store: ScoreStore, prefix: str, reference: str, windows: int
) -> dict[str, float]:
    """The largest difference of each column, scored with a Hugging Face model."""
    from megatron_slm.scoring.foreign_model import huggingface_fingerprint

    _check_same_reference(store, huggingface_fingerprint(reference), reference)
    import torch

    from megatron_slm.scoring.corpus import TokenStream, rescore
    from megatron_slm.scoring.foreign_model import transformers_runner

    stream = TokenStream(prefix)
    runner = transformers_runner(
        reference,
        stream,
        stream.plan(store.manifest),
        store.columns,
        device="cuda" if torch.cuda.is_available() else "cpu",
        vocabulary_size=CorpusManifest.read(prefix).tokenizer["vocabulary_size"],
    )
    return rescore(runner, store, windows)


def _with_checkpoint(
    store: ScoreStore, prefix: str, reference: str, windows: int
) -> dict[str, float]:
    """The largest difference of each column, scored with one of our checkpoints."""
    from megatron_slm.config.schema import DeviceConfig, ParallelConfig
    from megatron_slm.scoring.reference import load_scoring_model, open_reference, scoring_config

    opened = open_reference(reference, CorpusManifest.read(prefix))
    _check_same_reference(store, opened.fingerprint, reference)

    # The rest loads torch, so it waits until everything has been found.
    from megatron_slm.device import choose_device

    device = choose_device("auto")  # before anything imports megatron.core
    from megatron_slm.parallel import join_job, leave_job
    from megatron_slm.scoring.corpus import TokenStream, rescore
    from megatron_slm.scoring.model import megatron_runner

    stream = TokenStream(prefix)
    config = scoring_config(
        opened,
        store.manifest.window_tokens,
        ParallelConfig(),
        # model.json holds what a DeviceConfig had when the checkpoint was saved.
        DeviceConfig(precision=cast(Literal["fp32", "bf16", "fp16"], opened.info.precision)),
    )
    groups = join_job(config.parallel, device, config.run.seed)
    try:
        runner = megatron_runner(
            load_scoring_model(opened, config, groups),
            groups,
            stream,
            stream.plan(store.manifest),
            store.columns,
            micro_batch_size=4,
        )
        return rescore(runner, store, windows)
    finally:
        leave_job()


def _check_same_reference(store: ScoreStore, fingerprint: str, reference: str) -> None:
    if fingerprint != store.manifest.reference_fingerprint:
        raise ValueError(
            f"{reference} is not the reference of {store.folder}: its fingerprint is "
            f"{fingerprint[:19]}…, the scores were made by {store.manifest.reference_description} "
            f"({store.manifest.reference_fingerprint[:19]}…)"
        )


@says_missing_extra("check_scores")
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        problems = rescore_windows(
            options.corpus.removesuffix(".bin").removesuffix(".idx"),
            options.scores,
            options.reference,
            options.windows,
            options.tolerance_nats,
        )
    except (ValueError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"check_scores: {problem}", file=sys.stderr)
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
