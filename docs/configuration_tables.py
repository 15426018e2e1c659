"""Write the tables of docs/configuration.md from the schema, so that the page cannot be out of
date.

    python docs/configuration_tables.py

Everything above the line MARK in the page is written by hand and stays.
"""

import dataclasses
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_slm.config import schema  # noqa: E402
from megatron_slm.config.help import about, default_of, texts_of, values_of  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
MARK = (
    "<!-- From here on written by docs/configuration_tables.py: change "
    "megatron_slm/config/schema.py instead. -->"
)


def table(cls, prefix: str) -> list[str]:
    """One section: heading, what it is about, one row per field; sections inside it follow."""
    hints, texts = typing.get_type_hints(cls, include_extras=True), texts_of(cls)
    nested = [
        field for field in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[field.name])
    ]
    lines = [
        f"## {prefix}",
        "",
        about(cls),
        "",
        "| setting | default | values | |",
        "|---|---|---|---|",
    ]
    for field in dataclasses.fields(cls):
        if field not in nested:
            text = texts[field.name].replace("|", "\\|").replace("<name>", "`<name>`")
            default = f"`{default_of(field)}`" if default_of(field) else "empty"
            values = values_of(hints[field.name])
            lines.append(f"| `{prefix}.{field.name}` | {default} | {values} | {text} |")
    for field in nested:
        lines += ["", *table(hints[field.name], f"{prefix}.{field.name}")]
    return lines


def tables() -> str:
    """All sections of a run's configuration, as Markdown."""
    lines = []
    hints = typing.get_type_hints(schema.Config)
    for field in dataclasses.fields(schema.Config):
        lines += ["", *table(hints[field.name], field.name)]
    return "\n".join(lines) + "\n"


def page() -> str:
    """What the page should be."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
