"""Compare runs in one HTML file; see docs/monitoring.md."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_slm.config.arguments import Program
from megatron_slm.installation import says_missing_extra

DESCRIPTION = """Write one self-contained HTML file that compares training runs: a summary table,
validation and training losses, what was selected, real text with the selected tokens marked,
warnings, differing settings, versions.

Reads only the run folders' own files (metrics.jsonl, config.yaml, status.json, versions.txt,
warnings.jsonl, token_view.jsonl, evaluations.jsonl), so it also works on runs that are still going
or were stopped, without a GPU, and on another machine."""
EXAMPLE = """example:
  python -m megatron_slm.report --runs runs/plain runs/slm runs/random --output report.html

Put a plain run (scorer none) of the same data, initial weights and tokens per step among them: it
becomes the baseline, and the others' "tokens to reach its final loss" are in the table. The report
says which run is the baseline, or why there is none.
exit codes: 0 done, 2 bad usage, 3 a run folder that cannot be read"""


def build_parser() -> Program:
    parser = Program(
        "report",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="run folders, in the order they are shown",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="FILE",
        help="file to write (default: report.html in the first run folder)",
    )
    parser.add_argument(
        "--corpus",
        default=None,
        metavar="NAME",
        help="validation corpus to compare on (default: the first that all runs share)",
    )
    parser.add_argument(
        "--title", default="Selective Language Modeling: report", help="heading of the report"
    )
    return parser


@says_missing_extra("report")
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from megatron_slm.analysis.run_folder import read_runs

    try:
        runs = read_runs(options.runs)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"report: {line}", file=sys.stderr)
        return 3
    from megatron_slm.analysis.report_page import (  # these load matplotlib
        choose_corpus,
        write_report,
    )

    try:
        choose_corpus(runs, options.corpus)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    _print_table(runs, choose_corpus(runs, options.corpus))
    output = write_report(
        runs,
        options.output or Path(options.runs[0], "report.html"),
        corpus=options.corpus,
        title=options.title,
    )
    print(f"report of {len(runs)} run{'s' if len(runs) > 1 else ''}: {output.resolve()}")
    return 0


def _print_table(runs, corpus: str | None) -> None:
    """The summary of the page, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from megatron_slm.analysis.baseline import find_baseline
    from megatron_slm.analysis.captions import outcomes, unfinished
    from megatron_slm.analysis.style import short_count
    from megatron_slm.analysis.summary import describe_goal, goal_of

    lines = outcomes(runs, corpus)
    goal = goal_of(lines, runs, corpus)
    titles = [f"plain loss on {corpus}, nats per token"] if corpus else []
    titles += [f"goal: {describe_goal(goal)}"] if goal else []
    table = Table(title="; ".join(titles) or None, title_justify="left")
    for heading in (
        "run",
        "status",
        "last loss" if any(line.not_final for line in lines) else "final loss",
        "tokens",
        "selected",
        "tokens/s",
        *(["to the goal"] if goal else []),
    ):
        table.add_column(heading, justify="left" if heading in ("run", "status") else "right")

    def cell(value: float | None, to_text: Callable[[float], str] = short_count) -> str:
        return "-" if value is None else to_text(value)

    for line in lines:
        table.add_row(
            line.run.name,
            line.run.state.short,
            cell(line.loss, "{:.4f}".format),
            cell(line.processed),
            cell(line.selected),
            cell(line.tokens_per_second),
            *([cell(line.tokens_to_baseline)] if goal else []),
        )
    console = Console(soft_wrap=True)
    console.print(table)
    for sentence in (unfinished(runs), find_baseline(runs, corpus).sentence if corpus else ""):
        if sentence:
            console.print(sentence, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
