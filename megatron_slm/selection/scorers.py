"""Columns in, score out: what makes a token worth training on.

B: sequences, S: tokens of a sequence on this rank. A column is one value per token; the scorers say
which they need:

    loss               L_theta, the model's own loss, fp32, nats: always there
    entropy            H_theta, when a scorer needs it
    token_id, position, corpus_id
                       int64
    reference_loss, reference_entropy, any other name
                       stored columns, fp32 (NaN: no score for this token)

A scorer is a function. This is a whole one, options included:

    @register_scorer("relative_excess", needs=("loss", "{column}"))
    def relative_excess(columns, progress, *, column="reference_loss", floor_nats=0.1):
        excess_BS = columns["loss"] - columns[column]
        return excess_BS / (columns[column] + floor_nats)

`build_scorer("relative_excess", floor_nats=0.5)` makes it; the configuration names it the same way.
A package of your own names the module that registers it under the entry point group
"megatron_slm.scorers". The scorers of the literature are in builtin_scorers.py; those that weigh
tokens against each other, or make more than one choice, are classes in combinators.py.

None of these files imports torch: a scorer works through the methods of the tensors it is given, so
its kind, its needs and its options can be checked before torch is loaded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from megatron_slm.selection.naming import meant
from megatron_slm.selection.schedule import TrainingProgress
from megatron_slm.selection.scorer_base import Columns, Scorer

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_slm.selection.scope import Population
    from megatron_slm.selection.select import Selection

ENTRY_POINT_GROUP = "megatron_slm.scorers"
KINDS = ("score", "mask", "weight")
SCORERS: dict[str, Callable[..., Scorer]] = {}


class FunctionScorer(Scorer):
    """A registered function with its options bound."""

    def __init__(
        self, name: str, function: Callable[..., Tensor], needs: frozenset[str], kind: str
    ):
        self.name = name
        self._function = function
        self.needs = needs
        self.kind = kind
        self.choices = 1 if kind == "score" else 0

    def __call__(self, columns: Columns, progress: TrainingProgress) -> Tensor:
        return self._function(columns, progress)

    def choose(self, columns, eligible_BS, keep_fraction, population, progress) -> Selection:
        value_BS = self(columns, progress)
        if self.kind == "score":
            return population.top(value_BS, eligible_BS, keep_fraction)
        return choose_by_weight(value_BS, eligible_BS, population, soft=self.kind == "weight")


def choose_by_weight(
    value_BS: Tensor, eligible_BS: Tensor, population: Population, *, soft: bool
) -> Selection:
    """Keep the eligible tokens with a positive finite value; soft keeps the value as the weight, a
    mask (0 or 1) does not.
    """
    value_BS = value_BS.detach().float()
    mask_BS = eligible_BS.bool() & (value_BS > 0) & (value_BS < math.inf)
    return population.chosen(mask_BS, eligible_BS, value_BS.where(mask_BS, 0.0) if soft else None)


def register_scorer(name: str, *, needs: tuple[str, ...] = ("loss",), kind: str = "score"):
    """Decorator: make a function or a Scorer subclass available as `name`.

    A function is called as function(columns, progress, **options): its keyword-only arguments are
    the options of the scorer, and a need written "{option}" is the column that this option names.
    For a class, the arguments of __init__ are the options.
    """
    if kind not in KINDS:
        raise ValueError(f"kind of scorer {name!r} must be one of {', '.join(KINDS)}, got {kind!r}")

    def register(definition):
        if name in SCORERS:
            raise ValueError(f"a scorer named {name!r} is registered already; choose another name")
        if isinstance(definition, type):
            SCORERS[name] = definition
        else:
            SCORERS[name] = partial(_bind, name, definition, needs, kind)
        return definition

    return register


def _bind(
    name: str, function: Callable, needs: tuple[str, ...], kind: str, **options
) -> FunctionScorer:
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    known = {**defaults, **options}
    missing = [option for option, value in known.items() if value is inspect.Parameter.empty]
    _refuse_unknown(options, defaults)
    if missing:
        raise TypeError(f"option {', '.join(missing)} must be given")
    return FunctionScorer(
        name, partial(function, **options), frozenset(need.format(**known) for need in needs), kind
    )


def build_scorer(name: str, **options) -> Scorer:
    """The scorer registered as `name`, here or by an installed package.

    Raises ValueError for an unknown name or option.
    """
    if name not in SCORERS:
        _load_entry_point(name)
    made_by = SCORERS[name]
    try:
        if isinstance(made_by, type):
            _refuse_unknown(options, inspect.signature(made_by).parameters)
        scorer = made_by(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scorer {name}: {error}") from None
    scorer.name = name
    return scorer


def _refuse_unknown(options: Mapping[str, object], known: Mapping[str, object]) -> None:
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(
            f"unknown option {', '.join(unknown)}{meant(unknown[0], known)}; "
            f"its options are: {', '.join(known) or 'none'}"
        )


def child_scorer(setting: str | Mapping | Scorer) -> Scorer:
    """A scorer inside another one: its name, a mapping {name: ..., option: value}, or a Scorer."""
    if isinstance(setting, Scorer):
        return setting
    if isinstance(setting, str):
        return build_scorer(setting)
    if not isinstance(setting, Mapping) or "name" not in setting:
        raise ValueError(
            f"a scorer is given by its name or by a mapping with the key 'name', got {setting!r}"
        )
    return build_scorer(**setting)


def _load_entry_point(name: str) -> None:
    from importlib.metadata import entry_points

    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in offered:
        raise ValueError(_unknown(name, {*SCORERS, *offered}))
    try:
        offered[name].load()
    except Exception as error:
        # An installed package may raise anything; the message must name the scorer that the user
        # configured.
        raise ValueError(
            f"scorer {name}: entry point {offered[name].value} of an installed package cannot be "
            f"loaded: {error!r}"
        ) from error
    if name not in SCORERS:
        raise ValueError(
            f"entry point {offered[name].value} was loaded but registers no scorer named "
            f"{name!r}; use @register_scorer({name!r})"
        )


def _unknown(name: str, known: set[str]) -> str:
    if in_file(name):
        return (
            f"scorer {name} is code in a file, which only train and plan run, and only when their "
            "own configuration names it"
        )
    names = sorted(known)
    listed = ", ".join(names)
    return f"unknown scorer {name!r}{meant(name, names)}; known: {listed}, or PATH.py:NAME"


def in_file(name: str) -> bool:
    """Whether a scorer is named by a file and its name in there: PATH.py:NAME."""
    path, colon, inside = name.rpartition(":")
    return bool(colon) and path.endswith(".py") and inside.isidentifier()


@contextmanager
def registered_as(prefix: str) -> Iterator[list[str]]:
    """Scorers registered inside the block get `prefix` before their names; yields the names."""
    before = set(SCORERS)
    new_names: list[str] = []
    try:
        yield new_names
    finally:
        for name in [name for name in SCORERS if name not in before]:
            SCORERS[prefix + name] = SCORERS.pop(name)
            new_names.append(name)


def excess_loss(loss: Tensor, reference_loss: Tensor) -> Tensor:
    """loss - reference_loss: same shape, fp32, detached.

    Rho-1, equation 3. NaN where the reference has no score.
    """
    return loss.detach().float() - reference_loss.detach().float()
