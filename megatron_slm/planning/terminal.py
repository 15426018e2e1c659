"""A plan on the terminal."""

from rich.console import Console
from rich.table import Table as RichTable

from megatron_slm.planning.memory import rank_memory
from megatron_slm.planning.result import Plan
from megatron_slm.planning.tables import Table, tables


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """All tables, then what to do."""
    console = console or Console()
    if not console.is_terminal:  # a log or a pipe has no width of its own
        console = Console(width=120)
    for table in tables(plan):
        console.print(rich_table(table))
        console.print()
    for line in advice(plan):
        console.print(line, highlight=False, soft_wrap=True)


def rich_table(table: Table) -> RichTable:
    made = RichTable(title=table.title, title_justify="left", show_header=any(table.headings))
    for place, heading in enumerate(table.headings):
        made.add_column(
            heading, justify="right" if table.is_numeric(place) and any(table.headings) else "left"
        )
    for row in table.rows:
        made.add_row(*row)
    return made


def advice(plan: Plan) -> list[str]:
    """Whether it fits, and the best layout as options."""
    memory = rank_memory(plan.job, plan.fullest_stage)
    need, there = memory.total / 2**30, plan.usable_bytes / 2**30
    if plan.fits:
        lines = [
            f"It fits: {need:,.1f} of {there:,.1f} GiB at the fullest stage ({plan.fullest_stage})."
        ]
    else:
        lines = [
            f"WARNING: it does not fit. Stage {plan.fullest_stage} needs {need:,.1f} GiB, and {there:,.1f} GiB are usable."
        ]
    if plan.proposals:
        best = plan.proposals[0]
        gain = best.duration.tokens_per_second / plan.duration.tokens_per_second - 1
        if not plan.fits or gain > 0.01:
            lines += [
                f"The fastest layout that fits ({gain:+.0%} tokens per second):",
                f"  {best.overrides}",
            ]
    elif not plan.fits:
        lines.append(
            "No layout of these GPUs fits: take more nodes, a GPU with more memory, shorter sequences, or a smaller model."
        )
    return lines
