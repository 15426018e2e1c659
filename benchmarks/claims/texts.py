"""Real text that is on a machine with Python: sources, prose and documentation, as documents.

A source is a function that yields (id, text) in an order that depends on the ids alone, so that the
first so many bytes of it are the same wherever the same packages are installed.
"""

import ast
import contextlib
import gzip
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from launch.stdlib_corpus import OUTSIDE, is_curated

Document = tuple[str, str]
Source = Callable[[], Iterator[Document]]

MOST_CHARACTERS = 12_000
"""A document is cut here, so that no single file is a large share of a small corpus."""
LEAST_CHARACTERS = 200
SHORTEST_DOCSTRING = 120
PAGES_OF_ONE_PROGRAM = 40
"""Manual pages whose names begin alike (gcloud has thousands) beyond these are left out."""
DOCUMENTATION = Path("/usr/share/doc")
MANUALS = Path("/usr/share/man")


def digest(name: str) -> bytes:
    """What the order and the split of documents depend on."""
    return hashlib.sha256(name.encode()).digest()


def read_text(path: Path) -> str:
    """The text of a file, unpacked if its name ends in .gz; empty where it is no readable text."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def documents(
    root: Path, paths: Iterable[Path], prefix: str, text_of: Callable[[Path], str] = read_text
) -> Iterator[Document]:
    """The documents of files below `root`, in the order of the hashes of their ids."""
    names = [(f"{prefix}/{path.relative_to(root).as_posix()}", path) for path in paths]
    for name, path in sorted(names, key=lambda pair: digest(pair[0])):
        text = text_of(path)[:MOST_CHARACTERS]
        if len(text.strip()) >= LEAST_CHARACTERS:
            yield name, text


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _library_files(*, curated: bool) -> Iterator[Path]:
    root = standard_library()
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not set(OUTSIDE) & set(inside.parts) and is_curated(inside) == curated:
            yield path


def library_modules() -> Iterator[Document]:
    """Modules of the standard library that a person would read (launch/stdlib_corpus.py)."""
    return documents(standard_library(), _library_files(curated=True), "library")


def library_leftovers() -> Iterator[Document]:
    """The standard library's tests, generated tables and bundled packages."""
    return documents(standard_library(), _library_files(curated=False), "library")


def package_sources() -> Iterator[Document]:
    """Source files of the installed packages."""
    return documents(site_packages(), site_packages().rglob("*.py"), "packages")


def docstrings_of(path: Path) -> str:
    """The docstrings of a source file that are long enough to be prose, one after the other."""
    try:
        tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text and len(text) >= SHORTEST_DOCSTRING)


def docstrings() -> Iterator[Document]:
    """Docstrings of the installed packages and of the standard library, a document per file."""
    root = site_packages()
    yield from documents(root, root.rglob("*.py"), "docstrings", docstrings_of)


def package_pages() -> Iterator[Document]:
    """READMEs, licences and other pages that came with the installed packages."""
    root = site_packages()
    wanted = [
        path
        for path in root.rglob("*")
        if path.suffix in (".md", ".rst", ".txt")
        or path.name.startswith(("METADATA", "LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS"))
    ]
    return documents(root, wanted, "pages")


def system_documentation() -> Iterator[Document]:
    """Copyright files, changelogs, READMEs and news below /usr/share/doc, where there are any."""
    wanted = [
        path
        for path in DOCUMENTATION.rglob("*")
        if path.name.startswith(("copyright", "changelog", "README", "NEWS", "FAQ", "HACKING"))
        and path.is_file()
        and not path.is_symlink()
    ]
    return documents(DOCUMENTATION, wanted, "doc")


def _pages(folders: Iterable[Path]) -> Iterator[Path]:
    """Files of manual pages, few of each program."""
    seen: dict[str, int] = {}
    for folder in sorted(folders):
        for path in sorted(folder.glob("*.gz")):
            program = path.name.split(".")[0].replace("-", "_").split("_")[0]
            seen[program] = seen.get(program, 0) + 1
            if seen[program] <= PAGES_OF_ONE_PROGRAM and not path.is_symlink():
                yield path


def manual_pages() -> Iterator[Document]:
    """English manual pages as they are stored, with their markup."""
    return documents(MANUALS, _pages(MANUALS.glob("man[1-8]")), "man")


def translated_pages() -> Iterator[Document]:
    """Manual pages in other languages than English, where there are any."""
    return documents(MANUALS, _pages(MANUALS.glob("[a-z][a-z]*/man[1-8]")), "translated")


def without_repeats(found: Iterator[Document]) -> Iterator[Document]:
    """Documents whose text did not come before."""
    seen: set[bytes] = set()
    for name, text in found:
        mark = digest(text)
        if mark not in seen:
            seen.add(mark)
            yield name, text


def take(found: Iterator[Document], characters: int) -> list[Document]:
    """The first documents that together have at least so many characters, or all there are."""
    taken: list[Document] = []
    total = 0
    with contextlib.closing(found) if hasattr(found, "close") else contextlib.nullcontext():
        for document in found:
            if total >= characters:
                break
            taken.append(document)
            total += len(document[1])
    return taken
