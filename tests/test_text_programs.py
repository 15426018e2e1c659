"""The shape of data_tools and tokenizer, which turn text into corpora on machines without torch."""

import subprocess
import sys

import pytest

from tests.source_tree import ROOT, imported_modules, top_level

TEXT_PROGRAMS = ("data_tools", "tokenizer")
DATA_TOOLS_ROOMS = ("reading", "encoding", "writing")
"""A room of data_tools may import rooms before it; the programs on top may import all."""
MAY_BE_IMPORTED_BY_TOKENIZER = ("data_tools.reading",)
HEAVY = ("torch", "megatron", "transformers")


def test_imports_inside_data_tools_flow_one_way():
    folder = ROOT / "data_tools"
    rooms = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert rooms == {*DATA_TOOLS_ROOMS}, "a new room belongs into DATA_TOOLS_ROOMS"
    wrong = []
    for path in folder.glob("*/*.py"):
        place = path.relative_to(folder)
        allowed = DATA_TOOLS_ROOMS[: DATA_TOOLS_ROOMS.index(place.parts[0]) + 1]
        names = {name for name in imported_modules(path) if name.startswith("data_tools.")}
        wrong += [
            f"{place} imports {name}" for name in sorted(names) if name.split(".")[1] not in allowed
        ]
    assert not wrong, f"the order of the rooms is {DATA_TOOLS_ROOMS}, then the programs"


def test_the_tokenizer_needs_the_reading_room_alone():
    wrong = []
    for path in (ROOT / "tokenizer").glob("*.py"):
        names = {name for name in imported_modules(path) if name.startswith("data_tools")}
        wrong += [
            f"{path.name} imports {name}"
            for name in sorted(names)
            if not name.startswith(MAY_BE_IMPORTED_BY_TOKENIZER)
        ]
    assert not wrong


@pytest.mark.parametrize("folder", TEXT_PROGRAMS)
def test_text_programs_name_neither_torch_nor_megatron(folder):
    """Nor transformers, not even inside functions: these programs run on machines without them."""
    files = sorted((ROOT / folder).rglob("*.py"))
    found = {path.name: top_level(imported_modules(path)) & {*HEAVY} for path in files}
    assert not {name: names for name, names in found.items() if names}


def test_text_programs_load_neither_torch_nor_megatron():
    """Really import them, in a fresh interpreter: what they import must not load torch either."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in TEXT_PROGRAMS
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__init__"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [other for other in {HEAVY!r} if other in sys.modules]\n"
        "    assert not heavy, f'importing {name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
