"""report.html: several runs beside each other, in one file that needs nothing else."""

import itertools
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_slm.analysis import captions, figures, selection_figures, token_viewer
from megatron_slm.analysis.evaluations import evaluations
from megatron_slm.analysis.page import page, picture, table
from megatron_slm.analysis.run_folder import Run
from megatron_slm.analysis.summary import summary
from megatron_slm.config.load import flatten

SHOWN_DOCUMENTS = 3
SHOWN_TOKENS = 400


def write_report(
    runs: Sequence[Run],
    output: str | Path,
    *,
    corpus: str | None = None,
    title: str = "Selective Language Modeling: report",
) -> Path:
    """Write the report of `runs` to `output` (under a temporary name, then renamed).

    corpus: validation corpus the runs are compared on; None = the first one all runs share.
    ValueError when no run has it.
    """
    corpus = choose_corpus(runs, corpus)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(build_report(runs, corpus, title))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, output)
    return output


def choose_corpus(runs: Sequence[Run], corpus: str | None) -> str | None:
    """The validation corpus to compare runs on: `corpus`, or the first that all of them share.

    ValueError when no run has `corpus`.
    """
    names = [run.validation_names() for run in runs]
    known = list(dict.fromkeys(itertools.chain(*names)))
    if corpus is not None and corpus not in known:
        raise ValueError(
            f"no run was validated on {corpus!r}; the validation corpora of these runs: "
            f"{', '.join(known) or 'none'}"
        )
    shared = set(known).intersection(*names)
    first_shared = next((name for name in known if name in shared), None)
    return corpus or first_shared or next(iter(known), None)


def build_report(runs: Sequence[Run], corpus: str | None, title: str) -> str:
    """The report as HTML."""
    names = ", ".join(run.name for run in runs)
    return page(
        title,
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {names}",
        [
            ("Summary", summary(runs, corpus)),
            ("Validation loss", _validation(runs, corpus)),
            ("Evaluation", evaluations(runs)),
            ("Training loss", picture(figures.training_loss(runs), captions.training(runs))),
            ("What was selected", _selection(runs)),
            ("Selected tokens in their text", _text(runs)),
            (
                "Optimization and speed",
                picture(figures.learning_rate_and_grad_norm(runs), captions.optimization(runs))
                + picture(figures.throughput(runs), captions.throughput(runs)),
            ),
            ("Warnings", _warnings(runs)),
            ("How the runs differ", _differences(runs)),
            ("Versions and commands", _provenance(runs)),
        ],
    )


def _validation(runs: Sequence[Run], corpus: str | None) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.validation_names()))
    names.sort(key=lambda name: name != corpus)
    return "".join(
        (f"<h3>{escape(name)}</h3>" if len(names) > 1 else "")
        + picture(figures.validation_loss(runs, name), captions.validation(runs, name))
        for name in names
    )


def _selection(runs: Sequence[Run]) -> str:
    return (
        picture(figures.threshold_and_kept_fraction(runs), captions.threshold(runs))
        + picture(
            selection_figures.rate_over_time(runs),
            "Share of tokens selected over training, by how hard the reference finds them "
            "(0 = the easiest percent of tokens, 100 = the hardest).",
        )
        + picture(selection_figures.final_rate(runs), captions.by_reference_loss(runs))
        + picture(selection_figures.rate_by_position(runs), captions.by_position(runs))
        + picture(
            selection_figures.rate_by_corpus(runs),
            "Share of tokens selected in each training corpus, as last recorded; a run has bars "
            "for its own corpora only.",
        )
    )


def _text(runs: Sequence[Run]) -> str:
    shown = [run for run in runs if run.token_views and not run.is_plain]
    # The run whose choice follows the reference first: of the arms it is the one whose marks say
    # most.
    shown.sort(key=lambda run: run.scorer == "random")
    parts = []
    for place, run in enumerate(shown):
        views = token_viewer.select_example(run.token_views, SHOWN_DOCUMENTS, SHOWN_TOKENS)
        rendered = "".join(map(token_viewer.render, views))
        parts.append(
            f"<details{' open' if place == 0 else ''}><summary>{escape(run.name)}</summary>"
            f"{rendered}</details>"
        )
    return token_viewer.legend() + "".join(parts) if parts else ""


def _warnings(runs: Sequence[Run]) -> str:
    items = [
        f"<li><b>{escape(run.name)}</b>: {escape(text)}</li>"
        for run in runs
        for text in [*_ending(run), *run.warnings]
    ]
    items += [
        f"<li><b>{escape(run.name)}</b>: {run.unreadable_lines} unreadable "
        f"line{'s' if run.unreadable_lines > 1 else ''} in metrics.jsonl left out</li>"
        for run in runs
        if run.unreadable_lines
    ]
    if not items:
        return '<p class="note">None of the runs gave a warning.</p>'
    return f'<ul class="warnings">{"".join(items)}</ul>'


def _ending(run: Run) -> list[str]:
    """How an unfinished run ended.

    Its reason is left out where it is among the warnings, where a failure is reported too.
    """
    state = run.state
    if state.is_finished:
        return []
    among_warnings = any(state.reason in text for text in run.warnings)
    if among_warnings or not state.reason:
        return [state.description]
    return [f"{state.description}: {state.reason}"]


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    flat = [flatten(run.config) for run in runs]
    rows = []
    for key in sorted(set().union(*flat) - {"run.folder", "run.name"}):
        values = [_value(settings.get(key)) for settings in flat]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(key)}</code>", *map(escape, values)])
    if not rows:
        return '<p class="note">The runs have the same settings.</p>'
    return table(["setting", *(run.name for run in runs)], rows, text=True)


def _provenance(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        command = f"python -m megatron_slm.train --config {run.folder}/config.yaml"
        versions = '<p class="note">no versions.txt</p>'
        if run.versions:
            versions = f"<pre>{escape(run.versions)}</pre>"
        parts.append(
            f"<details><summary>{escape(run.name)}</summary><p>Started again, under torchrun or "
            "srun with the same number of processes, "
            f"with</p><pre>{escape(command)}</pre>{versions}</details>"
        )
    return "".join(parts)


def _value(value: Any) -> str:
    return "–" if value is None else str(value)
