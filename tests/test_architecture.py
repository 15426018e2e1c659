"""The shape of the house: which room may import which, what stays light, what is packaged, and that
the README's tree and the names in the guides are true.
"""

import ast
import re
import subprocess
import sys

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from setuptools import find_packages

from megatron_slm import installation
from megatron_slm.installation import command_of
from tests.source_tree import (
    BESIDE_THE_LIBRARY,
    PACKAGE,
    ROOT,
    imported_modules,
    inside,
    library_files,
    project_files,
    room_of,
    top_level,
    tree,
)

# A room may import rooms before it. `model` reads the batches that `data` makes, so data is first.
ROOMS = (
    "installation",
    "files",
    "core_versions",
    "config",
    "selection",
    "planning",
    "ops",
    "cpu_standins",
    "shared_gpu",
    "device",
    "accelerations",
    "parallel",
    "monitoring",
    "tokenization",
    "data",
    "model",
    "checkpoint",
    "scoring",
    "training",
    "evaluation",
    "convert",
    "analysis",
    "pipeline",
    "testing",
)
PROGRAMS = (
    "train",
    "score",
    "evaluate",
    "harness",
    "import_scores",
    "export_hf",
    "import_hf",
    "check_export",
    "check_scores",
    "report",
    "plan",
    "submit",
)
MAY_IMPORT_MEGATRON = {"cpu_standins", "parallel", "data", "model", "checkpoint", "testing"}
WITHOUT_TORCH = (
    "installation.py",
    "files/",
    "core_versions.py",
    "config/",
    "planning/",
    "selection/alarms.py",
    "monitoring/run_status.py",
    "selection/rules.py",
    "training/scorer_settings.py",
    "data/manifest.py",
    "tokenization/",
    "checkpoint/folder.py",
    "checkpoint/architecture.py",
    "training/stop_signals.py",
    "pipeline/",
    "submit.py",
)


def test_every_room_is_known_to_this_test():
    there = {room_of(path) for path in library_files()} - {"__init__"}
    assert there == {*ROOMS, *PROGRAMS}, (
        "a new room belongs into ROOMS (in the order of imports), a new program into PROGRAMS, "
        "and both into the README's tree"
    )


@pytest.mark.parametrize("room", (*ROOMS, *PROGRAMS))
def test_imports_flow_one_way(room):
    allowed = set(ROOMS[: ROOMS.index(room)]) if room in ROOMS else set(ROOMS)
    wrong = []
    for path in library_files():
        if room_of(path) != room:
            continue
        names = {name for name in imported_modules(path) if name.startswith("megatron_slm.")}
        rooms = {name.split(".")[1] for name in names} & {*ROOMS, *PROGRAMS}
        wrong += [f"{inside(path)} imports {other}" for other in sorted(rooms - allowed - {room})]
    assert not wrong, f"{wrong}: {room} may import {sorted(allowed)} only"


def test_scoring_and_training_meet_only_on_disk():
    others = {"scoring": "megatron_slm.training", "training": "megatron_slm.scoring"}
    wrong = [
        f"{inside(path)} imports {name}"
        for path in library_files()
        if room_of(path) in others
        for name in imported_modules(path)
        if name.startswith(others[room_of(path)])
    ]
    assert not wrong


def test_the_library_never_imports_what_stands_beside_it():
    wrong = [
        f"{inside(path)} imports {name}"
        for path in library_files()
        for name in top_level(imported_modules(path)) & {*BESIDE_THE_LIBRARY}
    ]
    assert not wrong


def test_megatron_core_is_touched_in_few_rooms():
    wrong = [
        inside(path)
        for path in library_files()
        if "megatron" in top_level(imported_modules(path))
        and room_of(path) not in MAY_IMPORT_MEGATRON
    ]
    assert not wrong, f"{wrong}: only {sorted(MAY_IMPORT_MEGATRON)} may import megatron.*"


def test_the_data_are_imported_without_megatron_core():
    """Trainers that have none read samples and scores too (docs/in_your_trainer.md)."""
    wrong = [
        inside(path)
        for path in library_files()
        if room_of(path) == "data" and "megatron" in top_level(imported_modules(path, lazily=False))
    ]
    assert not wrong, f"{wrong}: import it inside the function that needs it"


@pytest.mark.parametrize("room", ("selection", "ops"))
def test_the_algorithm_needs_torch_alone(room):
    """torch, numpy and the standard library; Triton inside functions, or in files named after it
    that are imported inside functions.
    """
    for path in library_files():
        if room_of(path) != room:
            continue
        allowed = {"torch", "numpy", "megatron_slm"} | sys.stdlib_module_names
        assert not top_level(imported_modules(path)) - allowed - {"triton"}, inside(path)
        own = {name for name in imported_modules(path) if name.startswith("megatron_slm.")}
        assert {name.split(".")[1] for name in own} <= {"selection", "ops"}, inside(path)
        at_import = imported_modules(path, lazily=False)
        assert "triton" in path.stem or not [name for name in at_import if "triton" in name], (
            f"{inside(path)}: import Triton inside the function that needs it"
        )


@pytest.mark.parametrize("where", WITHOUT_TORCH)
def test_light_files_name_no_torch(where):
    files = [path for path in library_files() if inside(path).startswith(where)]
    assert files, f"{where} is gone; WITHOUT_TORCH is out of date"
    assert not [inside(path) for path in files if "torch" in top_level(imported_modules(path))]


def test_light_files_load_no_torch():
    """Really import them, in a fresh interpreter: what they import must not load torch either."""
    modules = ["megatron_slm"] + [
        f"megatron_slm.{inside(path).removesuffix('.py').replace('/', '.')}"
        for path in library_files()
        for where in WITHOUT_TORCH
        if inside(path).startswith(where) and path.stem != "__init__"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'megatron', 'transformers'} & {*sys.modules}\n"
        "    assert not heavy, f'importing {name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_root_of_the_package_holds_the_version_only():
    assigned = [
        node for node in tree(PACKAGE / "__init__.py").body if not isinstance(node, ast.Expr)
    ]
    assert [ast.unparse(node.targets[0]) for node in assigned] == ["__version__"]


def test_every_folder_of_the_library_is_packaged():
    found = find_packages(str(ROOT), include=["megatron_slm*"])
    assert {
        f"megatron_slm.{path.parent.relative_to(PACKAGE).as_posix().replace('/', '.')}"
        for path in library_files()
        if path.parent != PACKAGE
    } == set(found) - {"megatron_slm"}, (
        "every folder of the library needs an __init__.py to be packaged"
    )


def _programs_beside_the_library() -> list[str]:
    return [
        f"{folder}.{path.stem}"
        for folder in ("tokenizer", "data_tools")
        for path in sorted((ROOT / folder).glob("*.py"))
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    ]


def test_every_program_has_a_console_command():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    commands = {
        command_of(f"megatron_slm.{name}"): f"megatron_slm.{name}:main" for name in PROGRAMS
    }
    for module in _programs_beside_the_library():
        function = command_of(module).removeprefix("slm-").replace("-", "_")
        commands[command_of(module)] = f"megatron_slm.installation:{function}"
    commands["slm-root"] = "megatron_slm.installation:print_checkout"
    assert settings["project"]["scripts"] == commands


def test_a_command_of_a_program_beside_the_library_starts_that_one(monkeypatch):
    started = []
    monkeypatch.setattr(installation, "_run", started.append)
    modules = _programs_beside_the_library()
    for module in modules:
        function = command_of(module).removeprefix("slm-").replace("-", "_")
        getattr(installation, function)()
    assert started == modules


def test_the_readme_lists_every_command():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = re.findall(r"`(slm-[\w-]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(named) == set(settings["project"]["scripts"])


def test_console_commands_exist():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for command, target in settings["project"]["scripts"].items():
        module, function = target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), f"{command} = {target}"
        assert function in {
            node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)
        }, f"{command} = {target}"


def test_programs_can_be_imported_and_run():
    for name in PROGRAMS:
        source = (PACKAGE / f"{name}.py").read_text()
        main = next(
            node
            for node in tree(PACKAGE / f"{name}.py").body
            if isinstance(node, ast.FunctionDef) and node.name == "main"
        )
        assert [argument.arg for argument in main.args.args] == ["argv"], f"{name}.main(argv=None)"
        assert len(main.args.defaults) == 1, f"{name}.main(argv=None)"
        # megatron-core's saving spawns a process that imports the program again; unguarded it
        # would train twice.
        assert 'if __name__ == "__main__":' in source, name


def _dependency_names() -> set[str]:
    """What requirements/ lists, and what our code imports: the two can differ, as PyYAML is
    imported as yaml.
    """
    requirements = "".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    named = {
        match[1].lower().replace("-", "_")
        for line in requirements.splitlines()
        if (match := re.match(r"([A-Za-z][\w.-]*)", line))
    }
    imported = {
        name
        for path in project_files(".py")
        if "tests" not in path.parts
        for name in top_level(imported_modules(path))
    }
    return (named | imported) - {"megatron_slm", *BESIDE_THE_LIBRARY}


@pytest.mark.parametrize("folder", ("tokenizer", "data_tools", "launch", "examples"))
def test_no_file_hides_a_library(folder):
    """A script's folder comes first on sys.path: a tokenizer/sentencepiece.py would be imported
    instead of the package.
    """
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert not files & (sys.stdlib_module_names | _dependency_names())


def test_every_setting_is_read():
    """Nothing configured is ignored: each field's name is read somewhere in the library outside the
    schema and the loader.
    """
    schema = [PACKAGE / "config" / "schema.py", *PACKAGE.glob("config/*_settings.py")]
    assert len(schema) > 1
    sections = [
        node for path in schema for node in tree(path).body if isinstance(node, ast.ClassDef)
    ]
    fields = {
        node.target.id: section.name
        for section in sections
        for node in section.body
        if isinstance(node, ast.AnnAssign)
    }
    readers = [
        path for path in library_files() if path not in schema and inside(path) != "config/load.py"
    ]
    # check.py asks with getattr(section, name) for many; here only a plain attribute counts.
    read = {
        node.attr
        for path in readers
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
    }
    assert not {f"{section}.{name}" for name, section in fields.items() if name not in read}


# The README and the guides


def readme_tree() -> str:
    found = re.search(
        r"```\n(megatron_slm/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert found, "README.md has no tree (a ``` block that starts with megatron_slm/)"
    return found[1]


def test_the_readme_tree_names_every_room():
    words = set(re.findall(r"[\w.]+(?:/[\w.]*)*", readme_tree()))
    rooms = [
        f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py" for room in (*ROOMS, *PROGRAMS)
    ]
    folders = [f"{name}/" for name in (*BESIDE_THE_LIBRARY, "docs") if (ROOT / name).is_dir()]
    assert not [name for name in rooms + folders if name not in words]


def test_the_readme_tree_names_nothing_that_is_gone():
    files = {
        path.name
        for path in project_files(".py", ".sh", ".sbatch", ".md", ".yaml", ".txt", ".toml", ".html")
    } | {"Dockerfile"}
    named = set(re.findall(r"[\w]+\.(?:py|sh|sbatch|md|yaml|txt|toml|html)\b", readme_tree()))
    assert not named - files


def test_the_readme_prints_the_order_of_imports():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert " → ".join((*ROOMS, "programs")) in text
