"""One plain value from YAML or the command line as the type its field declares.

Nothing is guessed beyond number formats. An annotation is a plain type (bool, int, float, str), a
Literal, dict[str, Any], list[...] of these, several joined by `|`, Optional or Union, and any of
them inside Annotated. Every other one is refused when the schema is first used.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation, Overflow

from megatron_slm.config.nearest import did_you_mean

_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
UNREADABLE = object()
"""Stands for a value that could not be read; the problem is already noted."""

NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
"""What a plain type is called in front of a person."""


def plain(hint):
    """The annotation without Annotated around it."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def union_members(hint) -> tuple:
    """The members of `X | Y`, Union[X, Y] and Optional[X]; of another annotation, itself alone."""
    inner = plain(hint)
    if typing.get_origin(inner) in (typing.Union, types.UnionType):
        return tuple(part for member in typing.get_args(inner) for part in union_members(member))
    return (hint,)


def named_class(hint):
    """The dataclass of the entries that a `dict[str, ...]` holds by name; None for any other
    annotation.
    """
    arguments = typing.get_args(hint)
    is_mapping = typing.get_origin(hint) is dict
    return arguments[1] if is_mapping and dataclasses.is_dataclass(arguments[1]) else None


def require_known(hint, where: str) -> None:
    """TypeError for an annotation whose values `convert` could not check."""
    for member in map(plain, union_members(hint)):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is list and len(arguments) == 1:
            require_known(arguments[0], where)
            continue
        known = (
            member in NAMES
            or typing.get_origin(member) is typing.Literal
            or member == dict[str, typing.Any]
        )
        if not known:
            raise TypeError(
                f"{where}: its annotation {member} is none that config/values.py can check"
            )


def convert(value, hint, where: str, problems: list[str]):
    """`value` as the type `hint`, or UNREADABLE with a problem noted.

    TypeError for an annotation that `require_known` refuses.
    """
    if value is None and type(None) in union_members(hint):
        return None
    for accepted in union_members(hint):
        converted = _as_one(value, plain(accepted))
        if converted is not UNREADABLE:
            return converted
    problems.append(f"{where}: got {value!r}{_expected(value, hint)}")
    return UNREADABLE


def _as_one(value, hint):
    """`value` as an annotation that is no union, or UNREADABLE."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _as_literal(value, arguments)
    if origin is list:
        return _as_list(value, arguments[0])
    if hint == dict[str, typing.Any]:
        return dict(value) if isinstance(value, Mapping) else UNREADABLE
    if hint is type(None):
        return None if value is None else UNREADABLE
    if hint is bool:
        return value if isinstance(value, bool) else UNREADABLE
    if hint is int:
        return _as_whole_number(value)
    if hint is float:
        return _as_number(value)
    if hint is str:
        return _as_text(value)
    raise TypeError(f"the annotation {hint} is none that config/values.py can check")


def _as_literal(value, choices: tuple):
    if value in choices:
        return value
    # YAML reads words like off, no and none as booleans or null.
    if isinstance(value, bool) or value is None:
        word = {True: "true", False: "false", None: "none"}[value]
        return word if word in choices else UNREADABLE
    return UNREADABLE


def _as_whole_number(value):
    try:
        return whole_number(value)
    except ValueError:
        return UNREADABLE


def _as_number(value):
    if isinstance(value, bool):
        return UNREADABLE
    try:
        return float(value)  # also of text: YAML 1.1 reads 3e-4 as text
    except (TypeError, ValueError, OverflowError):
        return UNREADABLE


def _as_text(value):
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    return UNREADABLE


def _as_list(value, hint):
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        return UNREADABLE
    converted = [convert(item, hint, "", []) for item in items]
    return UNREADABLE if UNREADABLE in converted else converted


def _expected(value, hint) -> str:
    """The rest of a sentence that starts with the value got."""
    choices = [str(choice) for choice in _choices(hint)]
    if len(union_members(hint)) == 1 and choices:
        near = did_you_mean(value, choices)
        known = f"it can be {', '.join(choices)}"
        return f"; {near} ({known})" if near else f"; {known}"
    return f" ({type(value).__name__}); expected {type_name(hint)}"


def _choices(hint) -> tuple:
    inner = plain(hint)
    return typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else ()


def whole_number(value: int | float | str) -> int:
    """A count as people write it: 15000000000, 15_000_000_000, 15e9 or 15B are the same number.

    A suffix k, M, B (or G) or T multiplies by 10^3, 10^6, 10^9 or 10^12. ValueError for anything
    that is not a whole number; nothing is rounded.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"got {value!r}; expected a whole number")
    text = str(value).strip().replace("_", "")
    factor = _SUFFIXES.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if factor > 1 else text) * factor
    except (InvalidOperation, Overflow):
        number = Decimal("NaN")
    # 1e999999999 is a whole number too, and writing it out takes minutes.
    sensible = number.is_finite() and number.adjusted() < 40
    if not sensible or number != number.to_integral_value():
        raise ValueError(f"got {value!r}; expected a whole number (15_000_000_000, 15e9 or 15B)")
    return int(number)


def type_name(hint) -> str:
    return " or ".join(_member_name(plain(member)) for member in union_members(hint))


def _member_name(hint) -> str:
    several = {int: "whole numbers", float: "numbers", str: "texts"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(hint) is list:
        item = plain(arguments[0])
        return f"a list of {several.get(item, item)}"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return NAMES[hint]
