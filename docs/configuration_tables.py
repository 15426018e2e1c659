"""Write the tables of docs/configuration.md from the schema, so that the page cannot be out of date.

    python docs/configuration_tables.py

Everything above the line MARK in the page is written by hand and stays.
"""

import ast
import dataclasses
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_slm.config import schema  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
MARK = "<!-- From here on written by docs/configuration_tables.py: change megatron_slm/config/schema.py instead. -->"


def help_texts() -> dict[tuple[str, str], str]:
    """(class, field) -> the string under the field."""
    texts = {}
    for section in ast.parse(Path(schema.__file__).read_text(encoding="utf-8")).body:
        if isinstance(section, ast.ClassDef):
            for field, below in zip(section.body, section.body[1:]):
                if isinstance(field, ast.AnnAssign):
                    texts[section.name, field.target.id] = below.value.value
    return texts


def default_words(field: dataclasses.Field) -> str:
    """The default as it would be written in YAML."""
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return "`" + f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e") + "`"
    return f"`{value}`" if value != "" else "empty"


def type_words(hint) -> str:
    """The type in the words of somebody who writes YAML."""
    plain = {
        int: "whole number",
        float: "number",
        bool: "true, false",
        str: "text",
        type(None): "null",
    }
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(arguments)
    if origin is typing.Union:
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is list:
        return f"list of {type_words(arguments[0])}"
    return (
        "mapping"
        if origin is dict
        else plain.get(
            hint,
            "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
            if dataclasses.is_dataclass(hint)
            else str(hint),
        )
    )


def table(cls, prefix: str, texts: dict) -> list[str]:
    """One section: heading, what it is about, one row per field; sections inside it follow."""
    hints = typing.get_type_hints(cls)
    nested = [
        field for field in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[field.name])
    ]
    lines = [
        f"## {prefix}",
        "",
        cls.__doc__.strip(),
        "",
        "| setting | default | values | |",
        "|---|---|---|---|",
    ]
    for field in dataclasses.fields(cls):
        if field not in nested:
            text = texts[cls.__name__, field.name].replace("|", "\\|").replace("<name>", "`<name>`")
            lines.append(
                f"| `{prefix}.{field.name}` | {default_words(field)} | {type_words(hints[field.name])} | {text} |"
            )
    for field in nested:
        lines += ["", *table(hints[field.name], f"{prefix}.{field.name}", texts)]
    return lines


def tables() -> str:
    """All sections of a run's configuration, as Markdown."""
    texts, lines = help_texts(), []
    hints = typing.get_type_hints(schema.Config)
    for field in dataclasses.fields(schema.Config):
        lines += ["", *table(hints[field.name], field.name, texts)]
    return "\n".join(lines) + "\n"


def page() -> str:
    """What the page should be."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
