"""Token selection: which tokens carry the loss. Needs torch only; process groups are arguments; nothing is logged or configured here.

scorers.py      columns -> score: what a scorer is, and the registry that other packages extend
catalogue.py    the scorers of the literature, one function each
combinators.py  scorers made of scorers: both, either, band, mixtures
select.py       the exact top-k of a population spread over ranks        threshold.py, radix.py: how ranks agree on it
scope.py        which tokens compete with which                          running.py: a threshold carried over steps
schedule.py     keep fraction over training
diagnostics.py  sums and counts that describe a choice                   alarms.py: what they warn of
"""

from megatron_slm.selection import catalogue, combinators  # noqa: F401  (importing them registers their scorers)
from megatron_slm.selection.running import RunningThreshold
from megatron_slm.selection.schedule import Progress, Schedule, build_schedule
from megatron_slm.selection.scope import SCOPES, Population, select_in_scope
from megatron_slm.selection.scorers import (
    SCORERS,
    Scorer,
    build_scorer,
    excess_loss,
    register_scorer,
)
from megatron_slm.selection.select import Selection, kept_tokens, select_top

__all__ = [
    "SCOPES",
    "SCORERS",
    "Population",
    "Progress",
    "RunningThreshold",
    "Schedule",
    "Scorer",
    "Selection",
    "build_schedule",
    "build_scorer",
    "excess_loss",
    "kept_tokens",
    "register_scorer",
    "select_in_scope",
    "select_top",
]
