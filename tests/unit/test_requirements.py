"""What is needed is said once: the lists in requirements/, which pyproject.toml, requirements.txt
and the table of extras agree on; and every file is Python 3.10.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from megatron_slm.installation import EXTRAS
from tests.source_tree import ROOT, imported_modules, project_files, top_level

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
DYNAMIC = SETTINGS["tool"]["setuptools"]["dynamic"]
LISTS = {path.stem: path for path in (ROOT / "requirements").glob("*.txt")}
IMPORTED_AS = {"megatron_core": "megatron", "protobuf": "google", "pyyaml": "yaml"}
OLDEST_PYTHON = (3, 10)
NOT_IN_PYTHON_3_10 = {
    "tomllib",
    "datetime.UTC",
    "enum.StrEnum",
    "hashlib.file_digest",
    "contextlib.chdir",
    "asyncio.TaskGroup",
    "asyncio.timeout",
    "itertools.batched",
    "typing.Self",
    "typing.Never",
    "typing.assert_never",
    "typing.LiteralString",
    "typing.Required",
    "typing.NotRequired",
    "typing.Unpack",
    "typing.override",
    "builtins.ExceptionGroup",
    "builtins.BaseExceptionGroup",
}
POSSESSIVE = re.compile(r"[+*?}][+]|[(][?]>")
"""Repetitions and groups of re that keep no way back."""
KEYWORDS_NOT_IN_PYTHON_3_10 = {"process_group", "onexc"}


def required(*names: str) -> dict[str, str]:
    """Package, as it is compared -> its line, of these lists."""
    lines = [
        line.split(" #")[0].strip()
        for name in names
        for line in LISTS[name].read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_"): line for line in lines}


def named_files(*entries: dict) -> set[str]:
    return {name for entry in entries for name in entry["file"]}


def test_the_library_itself_needs_the_base_alone():
    assert DYNAMIC["dependencies"] == {"file": ["requirements/base.txt"]}


def test_every_list_is_an_extra_and_all_has_all_but_the_tests():
    extras = DYNAMIC["optional-dependencies"]
    assert {*extras} == {*LISTS} - {"base"} | {"all"}
    for name in LISTS.keys() - {"base"}:
        assert f"requirements/{name}.txt" in extras[name]["file"]
    everything = named_files(*(extras[name] for name in extras.keys() - {"all", "dev"}))
    assert set(extras["all"]["file"]) == everything


def test_a_checkout_installs_every_list_with_the_pins():
    words = (ROOT / "requirements.txt").read_text().splitlines()
    given = [line.split() for line in words if line.startswith("--")]
    assert ["--constraint", "constraints.txt"] in given
    lists = {file for option, file in given if option == "--requirement"}
    assert lists == {f"requirements/{name}.txt" for name in LISTS}


def test_what_is_pinned_is_needed_and_only_the_constraints_pin():
    pins = (ROOT / "constraints.txt").read_text()
    pinned = {name.lower().replace("-", "_") for name in re.findall(r"^([\w.-]+)==", pins, re.M)}
    needed = required(*LISTS)
    assert pinned <= {*needed}
    exact = {name for name, line in needed.items() if "==" in line.split(";")[0]}
    assert exact == {"megatron_core"}  # core_versions.py refuses any other


def test_every_requirement_says_why():
    for path in LISTS.values():
        for line in path.read_text().splitlines():
            assert "#" in line, f"{path.name}: {line}"


@pytest.mark.parametrize("name", ["train", "gpu", "hf", "wandb", "report"])
def test_a_missing_package_is_told_from_the_extra_that_brings_it(name):
    modules = {IMPORTED_AS.get(package, package) for package in required(name)}
    assert modules == {module for module, extra in EXTRAS.items() if extra == name}


def test_what_the_project_imports_is_required():
    """liger_kernel, Transformer Engine and apex are what the Dockerfile or the user installs, and
    lm_eval (which brings tqdm) what the user of megatron_slm.harness does.
    """
    folders = ("megatron_slm/", "tokenizer/", "data_tools/", "launch/")
    imported = {
        name
        for path in project_files(".py")
        if path.relative_to(ROOT).as_posix().startswith(folders)
        for name in top_level(imported_modules(path))
    }
    ours = {"megatron_slm", "tokenizer", "data_tools"}
    outside = {
        "liger_kernel",
        "transformer_engine",
        "apex",
        "amp_C",
        "_typeshed",
        "lm_eval",
        "tqdm",
    }
    needed = {IMPORTED_AS.get(name, name) for name in required(*LISTS.keys() - {"dev"})}
    assert imported - ours - outside - {*sys.stdlib_module_names} <= needed


def test_the_stated_pythons_are_the_same_everywhere():
    assert SETTINGS["project"]["requires-python"] == ">=3.10,<3.14"
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py310"
    stated = [
        line.rsplit(" ", 1)[1]
        for line in SETTINGS["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    ]
    assert stated == ["3.10", "3.11", "3.12", "3.13"]
    assert "(3, 10) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "launch/venv.sh").read_text()


def _names(tree: ast.Module) -> set[str]:
    """Dotted names that a file imports or uses, and names that it uses bare."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Name):
            found.add(f"builtins.{node.id}")
    return found


FOLDERS = sorted({path.parent.relative_to(ROOT) for path in project_files(".py")})


def texts_of(tree: ast.Module) -> list[str]:
    """The strings that a file gives to functions of re."""
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")
    ]
    patterns = [part for call in calls if call.args for part in ast.walk(call.args[0])]
    values = [part.value for part in patterns if isinstance(part, ast.Constant)]
    return [value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in values]


@pytest.mark.parametrize("folder", FOLDERS, ids=Path.as_posix)
def test_every_file_is_python_3_10(folder):
    """Its grammar, as far as this interpreter can tell, and the library's names; under Python 3.10
    mypy knows the rest.
    """
    for path in (ROOT / folder).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, str(path), feature_version=OLDEST_PYTHON)
        newer = _names(tree) & NOT_IN_PYTHON_3_10
        if "except ModuleNotFoundError:  # Python 3.10" in text:
            newer -= {"tomllib"}
        assert not newer, path
        possessive = [line for line in texts_of(tree) if POSSESSIVE.search(line)]
        assert not possessive, path
        keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert not keywords & KEYWORDS_NOT_IN_PYTHON_3_10, path
