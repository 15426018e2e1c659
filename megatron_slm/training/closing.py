"""The last lines of a run that is done: its losses, tokens and time, where everything is, and what
to do with it.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.folder import complete_checkpoints
from megatron_slm.monitoring.console import describe_losses, describe_validation, format_duration


def closing_lines(
    folder: Path,
    name: str,
    last: Mapping[str, Mapping[str, Any]],
    seconds: float,
    resume_step: int | None,
) -> list[str]:
    """What to print. last: the newest "train" and "validation" records of this start; seconds: how
    long it took.
    """
    return [_outcome(last, seconds, resume_step), *_places(folder, name)]


def _outcome(last: Mapping[str, Mapping[str, Any]], seconds: float, resume_step: int | None) -> str:
    training, validation = last.get("train"), last.get("validation")
    if training is None:
        return "done: nothing was left to train, all steps were trained before"
    tokens = f"{training['tokens/processed']:,} tokens"
    if selected := training.get("tokens/selected"):
        tokens += f" ({selected:,} of them trained on)"
    since = f" (since it was resumed after step {resume_step})" if resume_step else ""
    parts = [f"done: step {training['step']}", tokens, f"time {format_duration(seconds)}{since}"]
    if losses := describe_losses(training):
        parts.append(f"{losses} at the last log line")
    if validation is not None:
        parts.append(describe_validation(validation))
    return ", ".join(parts)


def _places(folder: Path, name: str) -> list[str]:
    run = shlex.quote(str(folder))
    newest = complete_checkpoints(folder / "checkpoints")[-1:]
    report = shlex.quote(str(folder / "report.html"))
    exported = shlex.quote(f"exports/{name}")
    rows = [("checkpoint", str(path)) for path in newest] + [
        ("metrics", str(folder / "metrics.jsonl")),
        ("report", f"python -m megatron_slm.report --runs {run} --output {report}"),
        ("export", f"python -m megatron_slm.export_hf --checkpoint {run} --output {exported}"),
    ]
    return [f"  {what:<10}  {where}" for what, where in rows]
