"""Token selection: which tokens carry the loss. Needs torch only; process groups are arguments;
nothing is logged or configured here.

scorers.py            columns -> score, and the registry that other packages extend
scorer_base.py        the interface of every scorer
builtin_scorers.py    the scorers of the literature, one function each
combinators.py        scorers made of scorers: both, either, band, mixtures
scorer_files.py       a scorer in a file of the user's own: PATH.py:NAME
rules.py              what a scorer, a scope and the head's rows decide before any token is seen
select.py             the exact top-k of a population spread over ranks
threshold.py          how ranks agree on its threshold, with radix.py
scope.py              which tokens compete with which, with sequence_top.py
running_threshold.py  a threshold carried over steps
schedule.py           keep fraction over training
diagnostics.py        sums and counts that describe a choice, with rates.py and metric_sums.py
alarms.py             heuristic warnings computed from them

Scorers and rules, schedules and alarms import no torch: a configuration is checked and planned, and
a report written, with the very scorers that train. A public name is loaded on first use.
"""

from importlib import import_module

from megatron_slm.selection import (  # noqa: F401  (registers their scorers)
    builtin_scorers,
    combinators,
)

MODULES = {
    "RunningThreshold": "running_threshold",
    "TrainingProgress": "schedule",
    "Schedule": "schedule",
    "build_schedule": "schedule",
    "SCOPES": "populations",
    "Population": "scope",
    "SCORERS": "scorers",
    "Scorer": "scorer_base",
    "build_scorer": "scorers",
    "excess_loss": "scorers",
    "register_scorer": "scorers",
    "Selection": "select",
    "kept_tokens": "select",
    "select_top": "select",
}
"""Where each public name is defined."""

__all__ = list(MODULES)


def __getattr__(name: str):
    """A public name, loaded on first use: half of them need torch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
