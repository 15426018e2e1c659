"""docs/faults.md: every test it names is there; every row names one or says there is none."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows() -> list[str]:
    """The rows of the tables whose last column is a test."""
    found, inside = [], False
    for line in PAGE.splitlines():
        if line.endswith("| test |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            found.append(line)
    return found


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED.findall(PAGE)}))
def test_every_test_it_names_exists(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = {name for place, name in NAMED.findall(PAGE) if place == file}
    assert named <= there


def test_every_row_names_a_test_or_says_that_there_is_none():
    assert len(rows()) > 50
    without = [row for row in rows() if not NAMED.search(row) and "no test" not in row]
    assert not without
