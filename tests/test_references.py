"""What the tree refers to is in it: files, links, documents, anchors, gates of the benchmarks.

A reader of a comment can look up only what came with the code. megatron-core is quoted by symbol,
since line numbers change with every release.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.source_tree import BESIDE_THE_LIBRARY, ROOT, project_files

FOLDERS = (
    "megatron_slm",
    "tokenizer",
    "data_tools",
    "launch",
    "examples",
    "benchmarks",
    "docs",
    "tests",
    ".ci",
)
READ = (".py", ".md", ".sh", ".sbatch", ".yaml", ".yml", ".toml", ".txt")
NOT_HERE = {
    "a document that is not in the repository": re.compile(
        r"\b(?:METHOD|DESIGN|REVIEW|STYLE|PERFORMANCE|MEGATRON_FACTS)(?:\.md\b|,? (?:section )?\d)"
        r"|\bUSERS_ASK\b"
    ),
    # A name of one letter is an example of a test, not a file.
    "a line of a file, which moves (quote the symbol)": re.compile(r"\b\w{2,}\.py:\d+"),
}
GATE = re.compile(r"(?<![\w-])([CG]\d{1,2})(?=\b|-[a-z])")
RESULTS = "benchmarks/RESULTS.md"


@functools.cache
def texts() -> dict[str, str]:
    """Path below the root -> text, of every file of the project except this one.

    Folders are named, since a working copy also holds runs, corpora and environments, and a copy
    without git must pass too.
    """
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in [*ROOT.iterdir(), *inside]
        if path.suffix in READ and path.is_file() and path != Path(__file__).resolve()
    }


def anchors(page: str) -> set[str]:
    """Fragments that lead somewhere in a page: its ids, and its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', page))


@pytest.mark.parametrize("kind", NOT_HERE)
def test_nothing_refers_to_what_a_reader_does_not_have(kind):
    found = [
        f"{name}: {match[0]}"
        for name, text in texts().items()
        for match in NOT_HERE[kind].finditer(text)
    ]
    assert not found, f"{kind}: {found}"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("a document that is not in the repository", "divided once (METHOD 4.1)"),
        ("a document that is not in the repository", "as METHOD.md 4.4 says"),
        ("a document that is not in the repository", "USERS_ASK 61"),
        ("a document that is not in the repository", "see DESIGN section 4"),
        ("a line of a file, which moves (quote the symbol)", "(router.py:465 of 0.16.1)"),
    ],
)
def test_such_references_are_recognised(kind, text):
    assert NOT_HERE[kind].search(text)


def test_anchors_of_guides_lead_somewhere():
    """`docs/page.md#anchor`, and `, #anchor` after it, anywhere; links within docs/ too."""
    lost = []
    for name, text in texts().items():
        cited = re.findall(r"docs/(\w+\.md)((?:#[\w-]+)(?:(?:, | and )#[\w-]+)*)", text)
        if name.startswith("docs/"):
            cited += re.findall(r"\]\((\w+\.md)(#[\w-]+)\)", text)
            own = Path(name).name
            cited += [(own, anchor) for anchor in re.findall(r"\]\((#[\w-]+)\)", text)]
        for page, fragments in cited:
            known = anchors(texts().get(f"docs/{page}", ""))
            wanted = re.findall(r"#([\w-]+)", fragments)
            lost += [f"{name}: docs/{page}#{anchor}" for anchor in wanted if anchor not in known]
    assert not lost


def gate_rows() -> dict[str, str]:
    head = texts()[RESULTS].split("## Gates", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| ([CG]\d+) \|(.*)$", head, re.MULTILINE))


def test_every_gate_is_defined_at_the_head_of_the_results():
    defined = gate_rows()
    cited = {
        (name, gate)
        for name, text in texts().items()
        if name.startswith(("benchmarks/", "docs/", "tests/gpu/"))
        for gate in GATE.findall(text)
    }
    assert {gate for _, gate in cited} >= {"C1", "C11", "C16", "G6"}
    assert not {f"{name}: {gate}" for name, gate in cited if gate not in defined}


def test_the_limits_of_the_cases_are_those_of_the_table():
    rows = gate_rows()
    limits = []
    for program in ("head", "step", "topk", "selected_set"):
        for node in ast.walk(ast.parse(texts()[f"benchmarks/{program}.py"])):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "Case"):
                continue
            name = node.args[0].value
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            limits += [(name, given[key].value) for key in ("gate", "floor") if key in given]
    assert len(limits) > 20
    wrong = [
        (name, limit)
        for name, limit in limits
        if not re.search(rf"\b{re.escape(str(limit))}0*\b", rows[name.split("-")[0]])
    ]
    assert not wrong


def _links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r"""(?:src|href)=["']([^"']+)["']""", text
    )


@pytest.mark.parametrize(
    "page",
    [
        path.relative_to(ROOT).as_posix()
        for path in project_files(".md")
        if path.parent.name in (ROOT.name, "docs", "benchmarks")
    ],
)
def test_links_lead_somewhere(page):
    broken = [
        link
        for link in _links(ROOT / page)
        if "://" not in link
        and not link.startswith(("#", "mailto:"))
        and not ((ROOT / page).parent / link.split("#")[0]).exists()
    ]
    assert not broken, f"{page}: {broken}"


@pytest.mark.parametrize(
    "page",
    [
        path.relative_to(ROOT).as_posix()
        for path in project_files(".md")
        if path.parent in (ROOT, ROOT / "docs")
    ],
)
def test_files_and_programs_that_pages_name_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = "|".join(("megatron_slm", *BESIDE_THE_LIBRARY, "docs"))
    named = {
        name.rstrip(".")
        for name in re.findall(
            rf"(?<![\w/.])((?:{places})/[\w./]+\.(?:py|sh|sbatch|md|yaml|svg|png))\b", text
        )
    }
    gone = [name for name in named if not (ROOT / name).exists()]
    for module in set(re.findall(rf"-m ((?:{places})\.[\w.]+)", text)):
        if not (ROOT / (module.rstrip(".").replace(".", "/") + ".py")).exists():
            gone.append(f"python -m {module}")
    assert not gone, f"{page} names what is not there: {gone}"
