"""How code is written: sizes of files and functions, what one statement may hold, and no state at
module level.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.source_tree import (
    ROOT,
    inside,
    library_files,
    outside_functions,
    project_files,
    tree,
)

CODE_TO_READ = ("megatron_slm", "tokenizer", "data_tools", "launch", "examples")
"""What users import or run; tests and benchmarks hold tables and may be longer."""
CODE_FILE_LINES = 300
TEST_FILE_LINES = 400
FUNCTION_LINES = 60
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign)
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of a compound statement that hold other statements; the rest is its own head."""
REGISTRIES = {"selection/scorers.py": {"SCORERS"}}
"""Module-level containers that code may add to: everything else at module level is a constant."""
MUTABLE_CALLS = {
    "dict",
    "list",
    "set",
    "defaultdict",
    "Counter",
    "OrderedDict",
    "deque",
    "bytearray",
}
CHANGING_METHODS = {
    "append",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "clear",
    "update",
    "setdefault",
    "add",
    "discard",
    "sort",
    "reverse",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stands_in(path: Path, places: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(ROOT / place) for place in places)


def lines_at_most(path: Path) -> int:
    to_read = stands_in(path, CODE_TO_READ)
    return CODE_FILE_LINES if to_read else TEST_FILE_LINES


def statements(path: Path) -> Iterator[ast.stmt]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.stmt))


def within(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement; of a compound one, such as `for` or `def`, those of its head."""
    for field, value in ast.iter_fields(statement):
        if field in BLOCKS:
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield from ast.walk(node)


def test_files_fit_in_a_head():
    long = {}
    for path in project_files(".py", ".sh", ".sbatch"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > lines_at_most(path):
            long[name_of(path)] = f"{lines} of at most {lines_at_most(path)}"
    assert not long


def test_functions_fit_on_a_page():
    long = {}
    for path in project_files(".py"):
        if not stands_in(path, CODE_TO_READ):
            continue
        for node in statements(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{name_of(path)}:{node.lineno} {node.name}"] = lines
    assert not long, f"over {FUNCTION_LINES} lines, docstring included: {long}"


def test_a_conditional_expression_holds_no_other():
    nested = []
    for path in project_files(".py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.IfExp):
                inner = [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
                if len(inner) > 1:
                    nested.append(f"{name_of(path)}:{node.lineno}")
    assert not nested, f"{nested}: use if statements, a table, or a function"


def test_a_statement_holds_one_comprehension():
    crowded = {}
    for path in project_files(".py"):
        for statement in statements(path):
            count = sum(isinstance(node, COMPREHENSIONS) for node in within(statement))
            if count > 1:
                crowded[f"{name_of(path)}:{statement.lineno}"] = count
    assert not crowded, f"{crowded}: give the inner one a name or a function"


def test_no_bag_of_leftovers():
    names = [
        path.relative_to(ROOT).as_posix()
        for path in project_files(".py")
        if path.stem in ("utils", "util", "helpers", "common", "misc")
    ]
    assert not names, f"{names}: name the file after what it holds"


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in MUTABLE_CALLS


def _targets(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to or deletes."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        return node.targets
    return [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []


def _module_containers(path: Path) -> set[str]:
    names = set()
    for node in outside_functions(tree(path)):
        if isinstance(node, ast.ClassDef):
            continue
        if isinstance(node, ASSIGNMENTS) and node in tree(path).body and _is_mutable(node.value):
            names |= {target.id for target in _targets(node) if isinstance(target, ast.Name)}
    return names


def _changed_names(path: Path) -> set[str]:
    """Names whose content a file changes: NAME[...] = x, del NAME[...], NAME.append(x)."""
    changed = set()
    for node in ast.walk(tree(path)):
        changed |= {
            target.value.id
            for target in _targets(node)
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
        }
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in CHANGING_METHODS
            and isinstance(node.func.value, ast.Name)
        ):
            changed.add(node.func.value.id)
    return changed


def test_no_state_at_module_level():
    wrong = []
    for path in library_files():
        containers = {name for name in _module_containers(path) if not name.startswith("__")}
        wrong += [
            f"{inside(path)}: {name} is a container in lower case"
            for name in containers
            if not name.isupper()
        ]
        wrong += [
            f"{inside(path)}: {name} is changed by code"
            for name in containers & _changed_names(path) - REGISTRIES.get(inside(path), set())
        ]
        wrong += [
            f"{inside(path)}:{node.lineno}: global {', '.join(node.names)}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Global)
        ]
    assert not wrong
