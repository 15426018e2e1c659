"""Read a run's settings: defaults, then the YAML file, then dotted overrides; every problem
reported at once.

`--model.layers 8` beats the file, the file beats the defaults. An unknown key is an error that
names the nearest one.
"""

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from megatron_slm import __version__
from megatron_slm.config.build import build_settings
from megatron_slm.config.code import code_of_the_file_alone
from megatron_slm.config.help import help_text
from megatron_slm.config.schema import Config
from megatron_slm.config.values import (
    named_class,
    union_members,
)
from megatron_slm.config.yaml_text import read_yaml


class ConfigError(ValueError):
    """All problems of a configuration, one sentence each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        super().__init__(
            f"{count} in the configuration:\n"
            + "\n".join(f"  - {_shortened(problem)}" for problem in problems)
        )


def _shortened(problem: str) -> str:
    """The sentence without its middle where it repeats a value of thousands of characters."""
    return problem if len(problem) <= 2000 else f"{problem[:1500]} … {problem[-400:]}"


class _ExactDumper(yaml.SafeDumper):
    """Text with control characters or foreign line breaks in double quotes: PyYAML's own choice
    reads U+0085 back as a space.
    """

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
        )


_ExactDumper.add_representer(str, _ExactDumper.represent_str)


OWN_OPTIONS = {
    "-h, --help": "Show this text and stop.",
    "--version": "Show the version and stop.",
    "--config FILE": "YAML file with any of the settings below.",
    "--print_config": "Print the resulting configuration as YAML and stop.",
}
"""Options that are no settings."""


@dataclasses.dataclass(frozen=True)
class PrintedPath:
    """An option without a value that prints where the program writes; scripts must not read YAML to
    know.
    """

    option: str
    of: Callable[[typing.Any], str]


RUN_FOLDER = PrintedPath("print_run_folder", lambda config: config.run.folder)
CHECK_ONLY = "--check_only"
"""An option of the programs that start several processes, for the scripts that start them."""
Fill = Callable[[dict], list[str]]
"""Completes the given settings (nested plain values) in place from files that they name.

It returns what is wrong, one sentence each."""


def parse_config(
    argv: list[str] | None,
    prog: str,
    description: str,
    settings_class=Config,
    usage: str = "[--config FILE] [--section.field VALUE ...]",
    fill: Fill = lambda values: [],
    printed_path: PrintedPath = RUN_FOLDER,
    own_options: Mapping[str, str] = {},
):
    """The settings of a program started with `argv` (None = sys.argv), as a `settings_class`.

    Prints the help, the version or the settings if an option requests it, and exits. Raises
    ConfigError with every unreadable, unknown or missing setting and what `fill` finds wrong,
    before anything is started. `own_options` are options without a value that the program took out
    of `argv` itself; --help lists them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        own = {
            **OWN_OPTIONS,
            **own_options,
            f"--{printed_path.option}": "Print that path and stop, for scripts.",
            CHECK_ONLY: "Check the settings and everything they name, print that path and stop.",
        }
        print(help_text(settings_class, f"{prog} {usage}", description, own), end="")
        raise SystemExit(0)
    if "--version" in argv:
        print(f"{prog} {__version__}")
        raise SystemExit(0)
    given, problems = split_arguments(argv)
    path = given.pop("config", None)
    print_only = given.pop("print_config", None) is not None
    path_only = given.pop(printed_path.option, None) is not None
    values, unreadable = _given_values(settings_class, path, given)
    problems += unreadable
    refused = fill(values)
    config = build_settings(settings_class, values, "", problems)
    if problems or refused:
        raise ConfigError(problems + refused)
    if print_only:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    if path_only:
        print(printed_path.of(config))
        raise SystemExit(0)
    return config


def _given_values(
    settings_class, path: str | None, given: Mapping[str, str]
) -> tuple[dict, list[str]]:
    """The nested values of the file, overridden by those of the command line, and what is wrong."""
    values: dict = {}
    problems: list[str] = []
    if path is not None:
        problems += merge_file(values, path)
        problems += code_of_the_file_alone(values, path, given)
    for option, text in given.items():
        keys = option.split(".")
        try:
            _set(values, keys, text if _is_text(settings_class, keys, text) else read_yaml(text))
        except yaml.YAMLError as error:
            problems.append(
                f"--{option}: got {text!r}, which is not readable as YAML: "
                f"{' '.join(str(error).split())}"
            )
    return values, problems


def from_mapping(values: Mapping, settings_class=None):
    """Build a Config (or another settings class) from nested plain values.

    Returns it with the list of problems (unknown keys, wrong types).
    """
    problems: list[str] = []
    return build_settings(settings_class or Config, values, "", problems), problems


def load_yaml(path: str | Path, fill: Fill = lambda values: []) -> Config:
    """The configuration in a YAML file alone; ConfigError with every problem.

    A run folder's config.yaml is complete and needs no `fill`.
    """
    values: dict = {}
    problems = merge_file(values, str(path))
    refused = fill(values)
    config, more = from_mapping(values)
    if problems or more or refused:
        raise ConfigError(problems + more + refused)
    return config


def to_mapping(config) -> dict:
    """Nested plain values that from_mapping and YAML take back."""
    return dataclasses.asdict(config)


def flatten(mapping: Mapping[str, typing.Any], prefix: str = "") -> dict[str, typing.Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, typing.Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_yaml(config) -> str:
    """The resolved configuration as YAML, in the order of the schema."""
    return yaml.dump(
        to_mapping(config), Dumper=_ExactDumper, sort_keys=False, allow_unicode=True, width=120
    )


def split_arguments(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """`--a.b value`, `--a.b=value` and bare `--flag` as a mapping; stray words are problems."""
    given: dict[str, str] = {}
    problems: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            problems.append(
                f"got {word!r} where an option was expected; options look like --section.field "
                "VALUE"
            )
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            takes_value = position < len(argv) and not (
                argv[position].startswith("--") and len(argv[position]) > 2
            )
            takes_value = takes_value and not name.startswith("print_")
            value = argv[position] if takes_value else "true"
            position += takes_value
        given[name] = value
    return given, problems


def merge_file(values: dict, path: str) -> list[str]:
    """Put the sections of a YAML file into `values`; returns what is wrong with the file."""
    try:
        loaded = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"--config {path}: no such file"]
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        return [f"--config {path}: not readable as YAML: {' '.join(str(error).split())}"]
    if loaded is not None and not isinstance(loaded, Mapping):
        return [f"--config {path}: expected sections such as `model:`, got {type(loaded).__name__}"]
    values.update(loaded or {})
    return []


def _is_text(cls, keys: list[str], text: str) -> bool:
    """Whether the field takes text as it stands: `--run.name 007` is a name, not the number 7."""
    hint = typing.get_type_hints(cls).get(keys[0])
    if len(keys) > 2 and named_class(hint):  # --runs.slm.config: a field of the entry `slm`
        return _is_text(named_class(hint), keys[2:], text)
    if len(keys) > 1:
        return dataclasses.is_dataclass(hint) and _is_text(hint, keys[1:], text)
    if hint is str:
        return True
    return str in union_members(hint) and text not in ("null", "~", "")


def _set(values: dict, keys: list[str], value) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        values = inner
    values[keys[-1]] = value
