"""Every field explains itself, and the explanations reach --help."""

import ast
import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from megatron_slm.config import schema
from megatron_slm.config.help import help_text
from megatron_slm.config.schema import Config


def sections() -> list[ast.ClassDef]:
    return [
        node
        for node in ast.parse(Path(schema.__file__).read_text()).body
        if isinstance(node, ast.ClassDef)
    ]


def field_names(cls=Config, prefix="") -> list[str]:
    """Dotted names of all settings; a list of entries counts as one."""
    hints = typing.get_type_hints(cls)
    names = []
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(hints[field.name])
        names += (
            field_names(hints[field.name], f"{prefix}{field.name}.")
            if nested
            else [f"{prefix}{field.name}"]
        )
    return names


def test_every_field_has_a_docstring():
    bare = []
    for section in sections():
        for field, below in zip(section.body, [*section.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            text = (
                below.value.value
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                else ""
            )
            if len(str(text).strip()) < 4 or not text.strip().endswith((".", "?")):
                bare.append(f"{section.name}.{field.target.id}")
    assert not bare, f"write a sentence under: {bare}"


@pytest.mark.parametrize("section", [section.name for section in sections()])
def test_every_section_has_a_docstring(section):
    assert (getattr(schema, section).__doc__ or "").strip().endswith(".")


def test_help_of_train_names_and_explains_every_field(capsys):
    from megatron_slm.train import main

    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert not [name for name in field_names() if f"--{name} VALUE" not in printed]
    assert "Share of the competing tokens that is kept" in printed
    assert "torchrun --nproc-per-node 2 -m megatron_slm.train" in printed  # an example to copy


def test_every_option_that_help_lists_is_taken(capsys):
    """Each with its own default for a value: none is refused as unknown."""
    from megatron_slm.config.load import parse_config
    from megatron_slm.train import main

    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^  (--[\w.+]+)", capsys.readouterr().out, re.MULTILINE)
    own = {"--config", "--print_config", "--print_run_folder", "--check_only", "--version"}
    settings = set(listed) - own
    assert settings == {f"--{name}" for name in field_names()}
    words = [word for name in sorted(settings) for word in (name, default_text(name[2:]))]
    assert parse_config(words, "test", "") == Config()


def default_text(name: str) -> str:
    value = Config()
    for part in name.split("."):
        value = getattr(value, part)
    return value if isinstance(value, str) else json.dumps(value)


def test_help_names_type_range_and_default():
    printed = " ".join(help_text(Config, "train", "about", {}).split())
    assert (
        "--model.layers VALUE Transformer layers. (whole number, at least 1; default: 4)" in printed
    )
    assert "(auto, cpu, cuda; default: auto)" in printed
    assert "(text; default: empty)" in printed


def test_defaults_are_of_the_declared_types():
    from megatron_slm.config.load import from_mapping, to_mapping

    config, problems = from_mapping(to_mapping(Config()))
    assert problems == []
    assert config == Config()


def test_the_page_of_settings_is_up_to_date():
    import importlib.util

    root = Path(__file__).resolve().parents[3]
    spec = importlib.util.spec_from_file_location(
        "configuration_tables", root / "docs" / "configuration_tables.py"
    )
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.page() == tables.PAGE.read_text(encoding="utf-8"), (
        "run: python docs/configuration_tables.py"
    )
    assert not [name for name in field_names() if f"| `{name}` |" not in tables.page()]
