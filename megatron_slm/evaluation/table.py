"""The table of an evaluation's metrics, on the terminal and in the report."""

from collections.abc import Mapping, Sequence
from typing import Any

EVALUATIONS = "evaluations.jsonl"
"""In a run folder: one line per evaluation, in the order they were made."""
Row = tuple[str, ...]
HEADER: Row = ("corpus", "tokens", "loss", "perplexity", "bits/byte")


def rows_of(metrics: Mapping[str, Any], corpora: Sequence[str]) -> list[Row]:
    """The cells of HEADER for each corpus, and below it for each of its token sets."""
    rows = []
    for corpus in corpora:
        rows.append(_row(corpus, f"validation/{corpus}", metrics))
        prefix = f"validation/{corpus}/"
        inside = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
        sets = dict.fromkeys(name.rpartition("/")[0] for name in inside if "/" in name)
        rows += [_row(f"  {each}", f"{prefix}{each}", metrics) for each in sets]
    return rows


def _row(label: str, prefix: str, metrics: Mapping[str, Any]) -> Row:
    def cell(name: str, form: str) -> str:
        value = metrics.get(f"{prefix}/{name}")
        return "–" if value is None else format(value, form)

    return (
        label,
        cell("tokens", ",.0f"),
        cell("loss", ".4f"),
        cell("perplexity", ".3f"),
        cell("bits_per_byte", ".4f"),
    )
