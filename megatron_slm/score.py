"""Score a corpus with a reference model: one loss per token, stored at the token's offset.

    torchrun --nproc-per-node 2 -m megatron_slm.score --checkpoint runs/reference \\
        --corpus data/corpus --output data/corpus_scores

Options may be written with dashes or underscores. Training then reads the folder as
selection.reference.scores. Started again after a kill, the same command continues and ends with the
same bytes. Large corpora: array jobs with --shard i/n and the same --output; the last to end
completes the store.

Exit codes: 0 done, 2 bad usage, 3 bad data, 85 stopped by a signal (start the same command again).
See docs/scoring.md.
"""

import os
import sys
from typing import TYPE_CHECKING

from megatron_slm.checkpoint.begin_token import other_than_trained
from megatron_slm.config.arguments import take_switch
from megatron_slm.config.load import CHECK_ONLY, ConfigError
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.installation import require, says_missing_extra
from megatron_slm.scoring.options import ScoringJob, parse, prepare
from megatron_slm.scoring.summary import finish, means, pending_shards
from megatron_slm.training.stop_signals import StopSignals

if TYPE_CHECKING:
    from megatron_slm.device import Device

STOPPED = 85


def run(job: ScoringJob, store: ScoreStore, device: "Device", rank: int) -> int:
    """Join the job, score this job's slice of the shards, and print a summary; the exit code."""
    from megatron_slm.parallel import join_job, leave_job
    from megatron_slm.scoring.corpus import TokenStream, score_corpus
    from megatron_slm.scoring.fp8_reference import state_fp8_change
    from megatron_slm.scoring.model import megatron_runner
    from megatron_slm.scoring.reference import load_scoring_model

    groups = join_job(
        job.config.parallel,
        device,
        job.config.run.seed,
        timeout_minutes=job.config.device.timeout_minutes,
    )
    try:
        stream = TokenStream(job.options.corpus)
        plan = stream.plan(store.manifest)
        if job.fp8_model is not None:
            state_fp8_change(job, job.fp8_model, store, groups, stream, plan)
        models = load_scoring_model(job.reference, job.config, groups)
        runner = megatron_runner(
            models,
            groups,
            stream,
            plan,
            store.columns,
            job.options.micro_batch_size,
        )
        report = score_corpus(
            runner,
            store,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            job_slice=job.job_slice,
            show_progress=groups.is_logger,
        )
    finally:
        leave_job()
    if rank == 0:
        # Reads every byte once more, so outside the process groups and their time limit.
        state = finish(store)
        print(f"{job.options.output}: {report.shards_written} shards written, {state}")
        print(f"{job.options.output}: {means(store)}")
        for column, count in report.without_score.items():
            if count:
                print(
                    f"score: warning: the reference gave no finite {column} for {count:,} tokens; "
                    "they will never be selected",
                    file=sys.stderr,
                )
    return 0


def begin_token_warnings(job: ScoringJob) -> list[str]:
    """One sentence when the reference was trained on documents that begin in another way."""
    corpus = {job.options.corpus: job.corpus.prepend_bos}
    return other_than_trained(job.reference.folder, job.reference.info.tokenizer, corpus)


def done_before(job: ScoringJob, store: ScoreStore, rank: int) -> int:
    """Nothing is left of this job's share: no process waits for another, and no model is loaded."""
    if rank == 0:
        done = "done before"
        if job.job_slice[1] > 1:
            done = f"share {job.options.shard} was done before"
        print(f"{job.options.output}: {done}, {finish(store)}")
        print(f"{job.options.output}: {means(store)}")
    return 0


def leave() -> None:
    # Finished shards are on disk, and the unfinished one is scored again: there is nothing to save.
    raise SystemExit(STOPPED)


@says_missing_extra("score")
def main(argv: list[str] | None = None) -> int:
    """Score, listening for requests to stop from the first line on; returns the exit code."""
    sentence = "score: stopped; finished shards are kept, and the same command continues"
    with StopSignals(sentence, on_request=leave):
        return score(argv)


def score(argv: list[str] | None) -> int:
    """Check everything that can be checked alone, then join the job and score; returns the exit
    code.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    argv, check_only = take_switch(argv, CHECK_ONLY)
    options = parse(argv, __doc__)
    try:
        job = prepare(options, world_size, argv)
        require("torch", "megatron")
        store = ScoreStore.create(job.options.output, job.manifest)
        if check_only:
            print(job.options.output)
            return 0
        if not pending_shards(store, job.job_slice):
            return done_before(job, store, rank)
        if rank == 0:
            for sentence in begin_token_warnings(job):
                print(f"score: warning: {sentence}", file=sys.stderr)
        from megatron_slm.device import choose_device, set_threads

        device = choose_device(job.config.device.kind)  # before anything imports megatron.core
    except ConfigError as error:
        if rank == 0:
            print(f"score: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if rank == 0:
            print(f"score: {error}", file=sys.stderr)
        return 3
    set_threads(job.config.device.threads_per_process)
    try:
        return run(job, store, device, rank)
    except ValueError as error:
        print(f"score: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
