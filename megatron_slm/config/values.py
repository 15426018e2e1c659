"""One plain value from YAML or the command line as the type its field declares; no guessing beyond number formats."""

import typing
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
UNREADABLE = object()
"""Stands for a value that could not be read; the problem is already noted."""


def convert(value, hint, where: str, problems: list[str]):
    """`value` as the type `hint`, or UNREADABLE with a problem noted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in arguments:
            return value
        if (
            isinstance(value, bool) or value is None
        ):  # YAML reads off/no/none-like words as booleans or null
            value = {True: "true", False: "false", None: "none"}[value]
            if value in arguments:
                return value
        problems.append(f"{where}: got {value!r}; it can be {', '.join(map(str, arguments))}")
        return UNREADABLE
    if value is None and type(None) in arguments:
        return None
    for accepted in arguments if origin is typing.Union else (hint,):
        converted = _as_plain(value, accepted)
        if converted is not UNREADABLE:
            return converted
    problems.append(f"{where}: got {value!r} ({type(value).__name__}); expected {_words(hint)}")
    return UNREADABLE


def _as_plain(value, hint):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return None if value is None else UNREADABLE
    if hint is bool:
        return value if isinstance(value, bool) else UNREADABLE
    if hint is int:
        try:
            return whole_number(value)
        except ValueError:
            return UNREADABLE
    if hint is float:  # YAML 1.1 reads 3e-4 as text
        try:
            return UNREADABLE if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return UNREADABLE
    if hint is str:
        return (
            value
            if isinstance(value, str)
            else ""
            if value is None
            else str(value)
            if isinstance(value, (int, float))
            else UNREADABLE
        )
    if origin is list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            return UNREADABLE
        items = [_as_plain(item, arguments[0]) for item in value]
        return UNREADABLE if UNREADABLE in items else items
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else UNREADABLE
    return value


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
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number != number.to_integral_value():
        raise ValueError(f"got {value!r}; expected a whole number (15_000_000_000, 15e9 or 15B)")
    return int(number)


def _words(hint) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    several = {int: "whole numbers", float: "numbers", str: "texts"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        return " or ".join(_words(argument) for argument in arguments)
    if origin is list:
        return f"a list of {several.get(arguments[0], arguments[0])}"
    if origin is dict:
        return "a mapping"
    return names.get(hint, str(hint))
