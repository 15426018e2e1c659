"""CONTRIBUTING.md names every room, and tests that exist; the open project's files are whole."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def rooms() -> set[str]:
    library = {path.parent.name for path in (ROOT / "megatron_slm").glob("*/__init__.py")}
    return library | {"tokenizer", "data_tools", "launch", "examples"}


def test_every_room_has_its_tests_in_the_guide():
    assert {name for name, _ in ROW.findall(GUIDE)} == rooms()


@pytest.mark.parametrize(("room", "cells"), ROW.findall(GUIDE))
def test_the_tests_that_the_guide_names_exist(room, cells):
    named = re.findall(r"`(tests/[\w/.]+)`", cells)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_citation_has_the_version_of_the_library():
    import megatron_slm

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == megatron_slm.__version__


def test_the_workflow_runs_what_continuous_integration_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    commands = [step.get("run") for step in workflow["jobs"]["tests"]["steps"]]
    assert ".ci/run" in commands
