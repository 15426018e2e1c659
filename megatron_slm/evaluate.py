"""Measure a finished model: plain loss, perplexity, bits per byte, the loss of frozen token sets.

    torchrun --nproc-per-node 2 -m megatron_slm.evaluate --checkpoint runs/slm \\
        --corpora '[{name: held_out, corpus: data/held_out}]' --output slm.json

Without --corpora, a run is measured on its own validation corpora. The metrics have the names and
the values that validation in training gives them (validation/<corpus>/loss in nats per token,
/perplexity, /tokens), and bits per byte beside them. A checkpoint is read in any layout
(--parallel.tensor 2); --huggingface FOLDER measures any causal model of transformers instead.

A token set keeps the same tokens for every model: those of a .npy file, or the top of a score
store, for example the 60 % on which a reference is furthest ahead of the base model:

    --token-sets '[{name: worth, corpus: held_out, scores: base_scores, minus: reference_scores}]'

Options may be written with dashes or underscores. The table is printed; --output is JSON; a run's
results are also kept in RUN/evaluations.jsonl, from which megatron_slm.report takes them, and
--wandb logs them to the run.

Exit codes: 0 done, 2 bad usage, 3 bad data, 85 stopped by a signal (nothing is kept; start again).
See docs/evaluation.md.
"""

import os
import sys
from typing import TYPE_CHECKING

from megatron_slm.config.arguments import take_switch
from megatron_slm.config.load import CHECK_ONLY, ConfigError
from megatron_slm.evaluation.job import EvaluationJob, prepare
from megatron_slm.evaluation.options import parse
from megatron_slm.installation import require, says_missing_extra
from megatron_slm.training.stop_signals import StopSignals

if TYPE_CHECKING:
    from megatron_slm.device import Device

STOPPED = 85


def run(job: EvaluationJob, device: "Device") -> int:
    """Join the job, measure, and let the last process write; the exit code."""
    from megatron_slm.evaluation.measure import measure_corpora
    from megatron_slm.evaluation.models import load_losses
    from megatron_slm.parallel import join_job, leave_job

    groups = join_job(
        job.config.parallel,
        device,
        job.config.run.seed,
        timeout_minutes=job.config.device.timeout_minutes,
    )
    try:
        metrics, token_sets = measure_corpora(job, load_losses(job, groups), groups)
        is_logger = groups.is_logger
    finally:
        leave_job()
    if is_logger:
        report(job, metrics, token_sets)
    return 0


def report(job: EvaluationJob, metrics: dict[str, float], token_sets: dict[str, str]) -> None:
    """Print and write the results. OSError where a file cannot be written."""
    from megatron_slm.evaluation import results

    record = results.record_of(job, metrics, token_sets)
    results.print_table(job, record)
    for sentence in results.warnings_of(record["metrics"], list(job.corpora)):
        print(f"evaluate: warning: {sentence}", file=sys.stderr)
    for path in results.write_results(job, record):
        print(f"results: {path}")
    if job.options.wandb:
        print(f"W&B: {results.log_to_wandb(job, record)}")


def leave() -> None:
    # An evaluation keeps nothing half done.
    raise SystemExit(STOPPED)


@says_missing_extra("evaluate")
def main(argv: list[str] | None = None) -> int:
    """Evaluate, listening for requests to stop from the first line on; returns the exit code."""
    sentence = "evaluate: stopped; nothing is kept, start the same command again"
    with StopSignals(sentence, on_request=leave):
        return evaluate(argv)


def evaluate(argv: list[str] | None) -> int:
    """Check everything that can be checked alone, then join the job and measure."""
    rank = int(os.environ.get("RANK", 0))
    argv, check_only = take_switch(argv, CHECK_ONLY)
    options = parse(argv, __doc__)
    try:
        job = prepare(options, int(os.environ.get("WORLD_SIZE", 1)))
        require("torch", "megatron", *(["transformers"] if options.huggingface else []))
        if rank == 0:
            for sentence in job.warnings:
                print(f"evaluate: warning: {sentence}", file=sys.stderr)
        if check_only:
            print(options.output)
            return 0
        from megatron_slm.device import choose_device, set_threads

        device = choose_device(job.config.device.kind)  # before anything imports megatron.core
    except ConfigError as error:
        if rank == 0:
            print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"evaluate: {error}", file=sys.stderr)
        return 3
    set_threads(job.config.device.threads_per_process)
    try:
        return run(job, device)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
