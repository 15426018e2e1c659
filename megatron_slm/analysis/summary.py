"""The head of a report: who is lowest, against which baseline, and the table of the runs."""

from collections.abc import Callable, Sequence
from html import escape

from megatron_slm.analysis import captions
from megatron_slm.analysis.baseline import find_baseline
from megatron_slm.analysis.captions import Outcome
from megatron_slm.analysis.page import table
from megatron_slm.analysis.run_folder import Run
from megatron_slm.analysis.style import colour, short_count


def summary(runs: Sequence[Run], corpus: str | None) -> str:
    """The section as HTML: sentences and the table."""
    lines = captions.outcomes(runs, corpus)
    goal = goal_of(lines, runs, corpus)
    header = [
        "run",
        "status",
        loss_heading(lines, corpus),
        "tokens processed",
        "tokens selected",
        "tokens per second",
    ] + ([f"tokens to reach {describe_goal(goal)}"] if goal else [])
    final = [line.loss for line in lines if line.loss is not None and not line.not_final]
    best = min(final) if len(final) > 1 else None
    rows = [
        _row(index, line, best) + ([_to_goal(line, goal)] if goal else [])
        for index, line in enumerate(lines)
    ]
    return _sentences(runs, corpus) + table(header, rows) + _explanation(corpus)


def goal_of(lines: Sequence[Outcome], runs: Sequence[Run], corpus: str | None) -> Outcome | None:
    """The line of the baseline, if it has a loss to reach."""
    baseline = find_baseline(runs, corpus).run
    return next((line for line in lines if line.run is baseline and line.loss is not None), None)


def describe_goal(goal: Outcome) -> str:
    """Of the form "3.400, the final loss of plain"."""
    if goal.not_final:
        return f"{goal.loss:.3f}, the loss of {goal.run.name} ({goal.not_final})"
    return f"{goal.loss:.3f}, the final loss of {goal.run.name}"


def loss_heading(lines: Sequence[Outcome], corpus: str | None) -> str:
    """Only the loss of runs that came to their end is called final."""
    if corpus is None:
        return "validation loss"
    kind = "loss" if any(line.not_final for line in lines) else "final loss"
    return f"{kind} on {corpus} (nats per token)"


def _row(index: int, line: Outcome, best: float | None) -> list[str]:
    mark = ""
    if best is not None and line.loss is not None and not line.not_final:
        mark = "*" if line.loss - best < captions.EQUAL_NATS else ""
    when = f" ({line.not_final})" if line.not_final else ""
    return [
        f'<span class="swatch" style="background:{colour(index)}"></span>{escape(line.run.name)}',
        escape(line.run.state.short),
        mark + _cell(line.loss, "{:.3f}".format) + when,
        _cell(line.processed, short_count),
        _cell(line.selected, short_count),
        _cell(line.tokens_per_second, short_count),
    ]


def _to_goal(line: Outcome, goal: Outcome) -> str:
    if line.tokens_to_baseline is None:
        return "not reached" if line.measured and line.loss is not None else "–"
    own = goal.tokens_to_baseline
    beside = f" ({line.tokens_to_baseline / own:.2f}×)" if own and line is not goal else ""
    return short_count(line.tokens_to_baseline) + beside


def _sentences(runs: Sequence[Run], corpus: str | None) -> str:
    if corpus is None:
        first = '<p class="note">No run was validated; set data.validation to compare them.</p>'
        notes = [captions.unfinished(runs)]
    else:
        first = f'<p class="lead">{escape(captions.validation(runs, corpus))}</p>'
        notes = [captions.unfinished(runs), find_baseline(runs, corpus).sentence]
    return first + "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)


def _explanation(corpus: str | None) -> str:
    if corpus is None:
        return ""
    return (
        '<p class="note">Validation is always the plain loss of all tokens. Marked: the lowest '
        f"final loss, and those less than {captions.EQUAL_NATS} nats above it. Tokens per second: "
        "median over log intervals.</p>"
    )


def _cell(value: float | None, to_text: Callable[[float], str]) -> str:
    return "–" if value is None else to_text(value)
