"""The report's table of what megatron_slm.evaluate has measured of the runs' checkpoints."""

from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_slm.analysis.page import table
from megatron_slm.analysis.run_folder import Run
from megatron_slm.evaluation.table import HEADER, rows_of


def evaluations(runs: Sequence[Run]) -> str:
    """The section as HTML; "" where nothing was evaluated.

    Of each run the newest evaluated checkpoint; of equal corpora and settings the newest result.
    """
    rows = [row for run in runs for record in _newest(run) for row in _rows(run, record)]
    if not rows:
        return ""
    header = ["run", "step", *HEADER, "sequences", "documents", "precision"]
    note = (
        '<p class="note">Plain loss in nats per token of the checkpoints, measured by '
        "megatron_slm.evaluate; below a corpus its frozen token sets. Results are comparable where "
        "sequence length, documents and precision agree.</p>"
    )
    return table(header, rows, text=True) + note


def _newest(run: Run) -> list[dict[str, Any]]:
    steps = [record["step"] for record in run.evaluations]
    kept: dict[str, dict[str, Any]] = {}
    for record in run.evaluations:
        if record["step"] == max(steps):
            same = (record["corpora"], record["settings"], record["token_sets"])
            kept[repr(same)] = record
    return list(kept.values())


def _rows(run: Run, record: dict[str, Any]) -> list[list[str]]:
    settings = record["settings"]
    limit = settings["sequences"]
    around = (
        f"{limit or 'all'} of {settings['sequence_length']} tokens",
        str(settings["document_policy"]),
        str(settings["precision"]),
    )
    rows = []
    for row in rows_of(record["metrics"], list(record["corpora"])):
        cells = (run.name, str(record["step"]), *row, *around)
        rows.append(list(map(escape, cells)))
    return rows
