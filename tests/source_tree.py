"""The project's files and their syntax trees, for the tests that read code."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_slm"
BESIDE_THE_LIBRARY = ("tokenizer", "data_tools", "launch", "examples", "benchmarks", "tests")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def library_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, *, lazily: bool = True) -> set[str]:
    """Dotted names imported by a file; `lazily=False` leaves out imports inside functions."""
    names = set()
    nodes = list(ast.walk(tree(path))) if lazily else list(outside_functions(tree(path)))
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; write the full name"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but what functions and lambdas hold."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def project_files(*suffixes: str) -> list[Path]:
    names = ("megatron_slm", *BESIDE_THE_LIBRARY, "requirements", "docs", ".ci")
    folders = [ROOT / name for name in names]
    found = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
    ]
    return sorted(
        found + [path for path in ROOT.iterdir() if path.is_file() and path.suffix in suffixes]
    )
