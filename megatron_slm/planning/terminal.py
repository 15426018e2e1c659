"""A plan on the terminal."""

from rich.console import Console
from rich.table import Table as RichTable

from megatron_slm.planning.memory import rank_memory
from megatron_slm.planning.propose import Alternative
from megatron_slm.planning.result import Plan
from megatron_slm.planning.tables import Table, tables
from megatron_slm.planning.wording import backward_rows_on_a_gpu

MANY_EPOCHS = 4
"""Repeating data up to about four times costs little (Muennighoff et al., arXiv 2305.16264)."""


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
    lines = []
    epochs = plan.job.epochs
    if epochs is not None and epochs > MANY_EPOCHS:
        lines.append(
            f"WARNING: the run passes {epochs:,.0f} times over its data: the corpora of "
            f"data.train hold {plan.job.corpus_tokens:,} tokens. If the run will read another "
            "corpus, give its size as --corpus-tokens (100e9); else lower schedule.train_tokens."
        )
    if rows := backward_rows_on_a_gpu(plan.job.config):
        lines.append(f"selection.backward_rows {plan.job.config.selection.backward_rows}: {rows}.")
    memory = rank_memory(plan.job, plan.fullest_stage)
    needed_gib = memory.total / 2**30
    usable_gib = plan.usable_bytes / 2**30
    if plan.fits:
        lines.append(
            f"It fits: {needed_gib:,.1f} of {usable_gib:,.1f} GiB at the fullest stage "
            f"({plan.fullest_stage})."
        )
    else:
        lines.append(
            f"WARNING: it does not fit. Stage {plan.fullest_stage} needs {needed_gib:,.1f} GiB, "
            f"and {usable_gib:,.1f} GiB are usable."
        )
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
            "No layout of these GPUs fits: take more nodes, a GPU with more memory, shorter "
            "sequences, or a smaller model."
        )
    return lines


def describe_alternatives(found: list[Alternative]) -> str:
    """Sentences for a job that train refuses: what it would accept instead."""
    lines = ["What train accepts instead and what fits, the fastest layout of each:"]
    for each in found:
        speed = each.proposal.duration.tokens_per_second
        options = " ".join(word for word in (each.change, each.proposal.overrides) if word)
        lines.append(f"  {speed:,.0f} tokens/s predicted: {options}")
    return "\n".join(lines)
