"""Nested plain values as a dataclass of settings, with every problem noted."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from megatron_slm.config.nearest import nearest
from megatron_slm.config.values import UNREADABLE, convert, named_class, require_known


def build_settings(cls, values, where: str, problems: list[str]):
    """A dataclass of settings from nested plain values.

    `where` is its place in the whole, such as "model."; `problems` gets a sentence for every
    unknown key and every value of a wrong type, whose field then keeps its default.
    """
    if not isinstance(values, Mapping):
        problems.append(f"{where or 'the file'}: expected fields of {cls.__name__}, got {values!r}")
        return cls()
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            advice = _nearest_setting(key, hints, where) or f"known here: {', '.join(fields)}"
            problems.append(f"{where}{key}: unknown field (got {values[key]!r}); {advice}")
    built: dict[str, Any] = {}
    for name, hint in hints.items():
        _require_checkable(hint, f"{where}{name}")
        if name in values:
            built[name] = _build_field(values[name], hint, f"{where}{name}", problems)
        elif fields[name].default is fields[name].default_factory is dataclasses.MISSING:
            problems.append(f"{where}{name}: missing; it must be given")
            built[name] = ""
    return cls(**{name: value for name, value in built.items() if value is not UNREADABLE})


def _require_checkable(hint, where: str) -> None:
    """TypeError for an annotation that is no dataclass, holds none, and `convert` cannot check."""
    holds_settings = _entry_class(hint) or named_class(hint)
    if not dataclasses.is_dataclass(hint) and holds_settings is None:
        require_known(hint, where)


def _build_field(value, hint, where: str, problems: list[str]):
    """The value of one field, or UNREADABLE with a problem noted."""
    if dataclasses.is_dataclass(hint):
        return build_settings(hint, value or {}, f"{where}.", problems)
    if entry := _entry_class(hint):
        return _build_list(entry, value, where, problems)
    if entry := named_class(hint):
        return _build_named(entry, value, where, problems)
    return convert(value, hint, where, problems)


def _nearest_setting(key, hints: dict, where: str) -> str:
    """`did you mean model.layers?` for `layer`: names here, and those one section further in."""
    places = {name: [f"{where}{name}"] for name in hints}
    for section, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            for name in typing.get_type_hints(hint):
                places.setdefault(name, []).append(f"{where}{section}.{name}")
    meant = nearest(key, places)
    return f"did you mean {' or '.join(places[meant])}?" if meant else ""


def _entry_class(hint):
    """The dataclass whose entries a `list[...]` holds; None for any other annotation."""
    arguments = typing.get_args(hint)
    is_list = typing.get_origin(hint) is list
    return arguments[0] if is_list and dataclasses.is_dataclass(arguments[0]) else None


def _build_named(cls, values, where: str, problems: list[str]):
    if not isinstance(values or {}, Mapping):
        problems.append(f"{where}: got {values!r}; expected entries by name, each with its fields")
        return UNREADABLE
    return {
        str(name): build_settings(cls, value or {}, f"{where}.{name}.", problems)
        for name, value in (values or {}).items()
    }


def _build_list(cls, values, where: str, problems: list[str]):
    if not isinstance(values, list):
        problems.append(
            f"{where}: got {values!r}; expected a list of entries with "
            f"{', '.join(field.name for field in dataclasses.fields(cls))}"
        )
        return UNREADABLE
    return [build_settings(cls, item, f"{where}[{i}].", problems) for i, item in enumerate(values)]
