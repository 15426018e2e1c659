"""Where the results of an evaluation go: a table, a JSON file, RUN/evaluations.jsonl and W&B."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slm import __version__
from megatron_slm.config.load import to_mapping
from megatron_slm.evaluation.job import EvaluationJob
from megatron_slm.evaluation.table import EVALUATIONS, HEADER, rows_of
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.monitoring.run_status import read_status
from megatron_slm.monitoring.sinks import append_durably, finite_or_null


def record_of(
    job: EvaluationJob, metrics: Mapping[str, float], token_sets: Mapping[str, str]
) -> dict[str, Any]:
    """The results with all that they depend on: plain values, NaN as null."""
    data = job.config.data
    info = job.checkpoint.info if job.checkpoint else None
    record: dict[str, Any] = {
        "kind": "evaluation",
        "model": job.model,
        "model_fingerprint": job.fingerprint,
        **({"step": info.step, "tokens/processed": info.tokens_processed} if info else {}),
        "evaluated_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "settings": {
            "sequence_length": data.sequence_length,
            "document_policy": data.document_policy,
            "sequences": job.options.sequences,
            "precision": job.config.device.precision,
        },
        "corpora": {
            name: {"corpus": corpus.prefix, "fingerprint": corpus.manifest.fingerprint}
            for name, corpus in job.corpora.items()
        },
        "token_sets": dict(token_sets),
        "metrics": dict(metrics),
    }
    return finite_or_null(record)


def write_results(job: EvaluationJob, record: Mapping[str, Any]) -> list[str]:
    """Write the JSON file where one is wanted, and the line in the run's folder; their paths.

    OSError where one cannot be written.
    """
    written = []
    if job.options.output:
        output = Path(job.options.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(output, dict(record))
        written.append(str(output))
    if job.run_folder is not None:
        path = job.run_folder / EVALUATIONS
        append_durably(path, json.dumps(record, allow_nan=False) + "\n")
        written.append(str(path))
    return written


def print_table(job: EvaluationJob, record: Mapping[str, Any]) -> None:
    """The results on the terminal. Losses are in nats per token."""
    from rich.console import Console
    from rich.table import Table

    settings = record["settings"]
    title = (
        f"{job.model}: plain loss in nats per token, sequences of {settings['sequence_length']} "
        f"tokens, documents {settings['document_policy']}, {settings['precision']}"
    )
    table = Table(title=title, title_justify="left")
    for column in HEADER:
        table.add_column(column, justify="left" if column == "corpus" else "right", no_wrap=True)
    for row in rows_of(record["metrics"], list(job.corpora)):
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


def warnings_of(metrics: Mapping[str, Any], corpora: Sequence[str]) -> list[str]:
    """What is missing from the metrics, and why."""
    warnings = []
    for corpus in corpora:
        unknown = metrics.get(f"validation/{corpus}/unknown_tokens")
        if unknown:
            warnings.append(
                f"{corpus} has no bits per byte: {unknown:,} of its tokens are the unknown token, "
                "whose text is lost"
            )
        empty = [
            name.removeprefix("validation/").removesuffix("/tokens")
            for name, value in metrics.items()
            if name.startswith(f"validation/{corpus}/") and name.endswith("/tokens") and not value
        ]
        warnings += [f"{name} has no loss: none of its tokens was read" for name in empty]
    return warnings


def log_to_wandb(job: EvaluationJob, record: Mapping[str, Any]) -> str:
    """Add the results to the W&B run that training has logged to; where that is, or why not."""
    from megatron_slm.monitoring.wandb_sink import WandbSink, wandb_run_id

    folder, config = job.run_folder, job.run_config
    assert folder is not None  # prepare has refused the rest
    assert config is not None
    status = read_status(folder)
    if status is not None and status.state == "running" and not status.was_killed:
        return "not logged: the run is still training, and one process at a time can log to its run"
    problems: list[str] = []
    sink = WandbSink(
        config.monitoring.wandb,
        run_folder=folder,
        name=config.run.name or folder.name,
        config=to_mapping(config),
        run_id=wandb_run_id(folder),
        warn=problems.append,
    )
    location = sink.location
    sink.log({"tokens/processed": record["tokens/processed"], **record["metrics"]}, record["step"])
    sink.close(status.state if status else "done")
    return "; ".join(problems) or location
