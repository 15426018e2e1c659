"""Which programs a launcher may start several processes of.

python launch/programs.py NAME      exit code 0: run it with launch/local.sh; 2: a sentence says how
to run it, or what was meant
"""

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_SEVERAL_PROCESSES = ("train", "score", "evaluate")


def programs() -> dict[str, str]:
    """Name -> module of every program of the project: a file that ends by calling its own main."""
    found = {}
    library = ROOT / "megatron_slm"
    if not library.is_dir():
        library = ROOT.parent  # a wheel carries launch/ inside the library: megatron_slm/_checkout/
    for folder in (ROOT / "tokenizer", ROOT / "data_tools", library):
        for path in sorted(folder.glob("*.py")):
            if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
                module = f"{folder.name}.{path.stem}"
                # tokenizer.train and megatron_slm.train: the library's, which comes last, has the
                # short name.
                found.pop(path.stem, None)
                found[path.stem] = module
    return found


def problem_with(name: str) -> str:
    """Why NAME cannot be started with several processes, and what to do; "" when it can."""
    known = programs()
    if name in OF_SEVERAL_PROCESSES:
        return ""
    if name in known:
        return f"{name} runs in one process: python -m {known[name]} ..."
    expected = " or ".join(OF_SEVERAL_PROCESSES)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"no program is called {name!r}{hint} (expected {expected})"


def main(argv: list[str]) -> int:
    problem = problem_with(argv[0])
    if problem:
        print(f"local.sh: {problem}", file=sys.stderr)
    return 2 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
