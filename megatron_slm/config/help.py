"""What --help and the page of settings show for a setting: text, values, default."""

import ast
import dataclasses
import shutil
import sys
import textwrap
import typing
from itertools import pairwise
from pathlib import Path

from megatron_slm.config.ranges import range_of
from megatron_slm.config.values import named_class, plain, union_members


def texts_of(settings_class) -> dict[str, str]:
    """Field name -> the string under the field, for a dataclass and those it extends."""
    texts: dict[str, str] = {}
    for part in reversed(settings_class.__mro__):
        if dataclasses.is_dataclass(part):
            texts |= _own_texts_of(part)
    return texts


def _own_texts_of(settings_class) -> dict[str, str]:
    file = sys.modules[settings_class.__module__].__file__
    assert file is not None  # settings are defined in files
    [found] = [
        node
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == settings_class.__name__
    ]
    texts: dict[str, str] = {}
    for field, below in pairwise(found.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr), f"no text stands under {field.target.id}"
            texts[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def about(settings_class) -> str:
    """What a section is about: its docstring on one line."""
    return " ".join(settings_class.__doc__.split())


def values_of(hint) -> str:
    """The type and range of an annotation, described for the author of a YAML file."""
    return " or ".join(_values_of_one(member) for member in union_members(hint))


def _values_of_one(hint) -> str:
    names = {
        int: "whole number",
        float: "number",
        bool: "true, false",
        str: "text",
        type(None): "null",
    }
    if bounds := range_of(hint):
        return f"{names[plain(hint)]}, {bounds}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(arguments)
    if origin is list:
        return f"list of {values_of(arguments[0])}"
    if origin is dict:
        return "entries by name" if named_class(hint) else "mapping"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    return names[hint]


def default_of(field: dataclasses.Field) -> str:
    """The default as it would be written in YAML; empty text where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    value = field.default
    if value is dataclasses.MISSING:
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return str(value)


def help_text(settings_class, usage: str, description: str, own_options: dict[str, str]) -> str:
    """What --help prints: usage, description, the program's own options, then every setting."""
    width = max(60, min(shutil.get_terminal_size().columns, 100) - 2)
    lines = [f"usage: {usage}", "", description.strip(), "", "options:"]
    for option, text in own_options.items():
        lines += _entry(option, text, width)
    return "\n".join(lines + _section(settings_class, "", width)) + "\n"


def _section(settings_class, where: str, width: int) -> list[str]:
    hints = typing.get_type_hints(settings_class, include_extras=True)
    texts = texts_of(settings_class)
    fields = dataclasses.fields(settings_class)
    nested = [field for field in fields if dataclasses.is_dataclass(hints[field.name])]
    heading = f"{where.rstrip('.')}: {about(settings_class)}" if where else "settings:"
    lines = ["", *textwrap.wrap(heading, width)] if len(nested) < len(fields) else []
    for field in fields:
        if field not in nested:
            required = field.default is field.default_factory is dataclasses.MISSING
            default = "must be given" if required else f"default: {default_of(field) or 'empty'}"
            text = f"{texts[field.name]} ({values_of(hints[field.name])}; {default})"
            lines += _entry(f"--{where}{field.name} VALUE", text, width)
    for field in nested:
        lines += _section(hints[field.name], f"{where}{field.name}.", width)
    for field in fields:
        if entry := named_class(hints[field.name]):
            lines += _section(entry, f"{where}{field.name}.NAME.", width)
    return lines


def _entry(option: str, text: str, width: int) -> list[str]:
    indent = " " * 8
    return [
        f"  {option}",
        *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent),
    ]
