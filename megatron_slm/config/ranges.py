"""The numbers a setting takes.

They stand in the annotations of schema.py; check.py holds a whole configuration against them.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from megatron_slm.config.values import union_members

LARGEST_WHOLE_NUMBER = 2**63 - 1
"""What a 64-bit integer holds; whole numbers become tensors and indices."""


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; a bound that is None does not limit.

    `note` explains it in the message.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    note: str = ""

    def __contains__(self, number: float) -> bool:
        if _too_large(number) or not math.isfinite(number):
            return False
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        given = [f"{word} {bound:,}" for word, bound in bounds if bound is not None]
        return " and ".join(given) or "a finite number"


Count = Annotated[int, Range(at_least=0)]
Size = Annotated[int, Range(at_least=1)]
NotNegative = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
BelowOne = Annotated[float, Range(at_least=0, below=1)]


def range_of(hint) -> Range | None:
    """The range in an annotation, where it has one."""
    return next((part for part in getattr(hint, "__metadata__", ()) if type(part) is Range), None)


def out_of_range(settings, where: str = "") -> Iterator[tuple[str, str]]:
    """(name, sentence) of every number out of range, in a dataclass and those inside it."""
    settings_class: Any = type(settings)
    for name, hint in _hints_of(settings_class).items():
        yield from _problems(getattr(settings, name), hint, f"{where}{name}")


# The planner checks thousands of configurations, and evaluating annotations takes ten times as long
# as comparing numbers.
@cache
def _hints_of(settings_class) -> dict[str, Any]:
    return typing.get_type_hints(settings_class, include_extras=True)


@cache
def _bounds_of(hint) -> Range:
    return next(filter(None, map(range_of, union_members(hint))), Range())


def _problems(value, hint, name: str) -> Iterator[tuple[str, str]]:
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int | float):
        bounds = _bounds_of(hint)
        if value not in bounds:
            yield name, f"{name}: got {value}; expected {_expected(value, bounds)}"
    elif dataclasses.is_dataclass(value):
        yield from out_of_range(value, f"{name}.")
    elif isinstance(value, list):
        [of_items] = typing.get_args(hint) or [Any]
        for position, item in enumerate(value):
            yield from _problems(item, of_items, f"{name}[{position}]")
    elif isinstance(value, Mapping):
        # Options of scorers and schedules, whose own checks know their bounds.
        for key, item in value.items():
            yield from _problems(item, Any, f"{name}.{key}")


def _expected(value: float, bounds: Range) -> str:
    if _too_large(value):
        return f"at most {LARGEST_WHOLE_NUMBER:,}, the largest 64-bit whole number"
    expected = str(bounds)
    if not math.isfinite(value) and expected != str(Range()):
        expected = f"a finite number, {expected}"  # infinity satisfies "at least 0" too
    return f"{expected} ({bounds.note})" if bounds.note else expected


def _too_large(number: float) -> bool:
    return isinstance(number, int) and abs(number) > LARGEST_WHOLE_NUMBER
