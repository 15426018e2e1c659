"""Take token scores made elsewhere into a score store; see docs/scoring.md."""

import os
import sys

from megatron_slm.data.manifest import check_corpus
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.installation import says_missing_extra
from megatron_slm.scoring.foreign_model import tokenizer_problem
from megatron_slm.scoring.import_options import (
    ImportOptions,
    manifest_of,
    parse,
    refuse_processes_without_work,
)
from megatron_slm.scoring.summary import finish, means, pending_shards
from megatron_slm.training.stop_signals import StopSignals

STOPPED = 85


@says_missing_extra("import_scores")
def main(argv: list[str] | None = None) -> int:
    """Import, and stop on a signal from the first line on; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
        refuse_processes_without_work(options, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        print(f"import_scores: {error}", file=sys.stderr)
        return 2
    sentence = "import_scores: stopped; finished shards are kept, and the same command continues"
    with StopSignals(sentence, on_request=_leave):
        return _import(options, argv)


def _leave() -> None:
    # Finished shards are on disk, and the unfinished one is filled again.
    raise SystemExit(STOPPED)


def _import(options: ImportOptions, argv: list[str]) -> int:
    """Fill the store with this job's slice and say what it holds; returns the exit code."""
    rank = int(os.environ.get("RANK", 0))
    try:
        corpus = check_corpus(options.corpus)
        if options.huggingface and (
            other := tokenizer_problem(options.huggingface, corpus.tokenizer)
        ):
            raise ValueError(other)
        store = ScoreStore.create(options.output, manifest_of(options, argv, corpus))
        pending = pending_shards(store, options.job_slice)
        if pending:
            from megatron_slm.scoring.importers import import_job  # loads torch

            import_job(store, options, corpus)
        if rank:
            return 0
        # Reads every byte once more, so outside the process groups and their time limit.
        state = ("" if pending else "done before, ") + finish(store)
        described = means(store)
    except (ValueError, OSError) as error:
        print(f"import_scores: {error}", file=sys.stderr)
        return 3
    print(f"{options.output}: {state}")
    print(f"{options.output}: {described}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
