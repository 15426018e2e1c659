"""Real text that every Python has: the source files of its standard library, as jsonl for the
quickstart.

    python launch/stdlib_corpus.py --output-folder runs/quickstart/text

One document per .py file. The rule, by path only:
  curated   library modules a person would read: everything but tests, generated tables and bundled
            or legacy packages
  held out  every sixth curated file by the hash of its path: the target domain, in no training data
  corpus    every file that is not held out, tests and generated tables included: what pretraining
            meets
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

# Path parts that mark a file as not curated: tests, generated tables, bundled installers, legacy
# and demo packages.
NOT_CURATED = (
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "distutils",
    "msilib",
    "__phello__",
)
OUTSIDE = ("site-packages", "dist-packages", "__pycache__")
HELD_OUT_EVERY = 6


def is_curated(path: Path) -> bool:
    """Whether a path relative to the standard library belongs to the curated part."""
    return not any(part in NOT_CURATED for part in path.parts) and not path.name.startswith(
        ("_sysconfigdata", "_pydecimal")
    )


def is_held_out(path: Path) -> bool:
    """Whether a curated path belongs to the held-out target domain."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return is_curated(path) and digest[0] % HELD_OUT_EVERY == 0


def corpora_of(path: Path) -> tuple[str, ...]:
    """The corpora that a file of the standard library belongs to."""
    if is_held_out(path):
        return ("held_out",)
    return ("corpus", "curated") if is_curated(path) else ("corpus",)


def write_corpora(library: Path, output: Path, max_bytes: int) -> dict[str, tuple[int, int]]:
    """Write corpus.jsonl, curated.jsonl, held_out.jsonl; documents and characters of each."""
    paths = sorted(
        path.relative_to(library)
        for path in library.rglob("*.py")
        if not set(OUTSIDE) & set(path.relative_to(library).parts)
    )
    if max_bytes:  # a spread of the whole library, not its first letters
        paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    output.mkdir(parents=True, exist_ok=True)
    counts = {name: [0, 0] for name in ("corpus", "curated", "held_out")}
    # Each is closed before it is renamed.
    files = {
        name: open(output / f"{name}.jsonl.tmp", "w", encoding="utf-8")  # noqa: SIM115
        for name in counts
    }
    total = 0
    for path in paths:
        text = (library / path).read_text(encoding="utf-8", errors="replace")
        if not text.strip() or (max_bytes and total > max_bytes):
            continue
        total += len(text)
        for name in corpora_of(path):
            files[name].write(json.dumps({"text": text, "id": path.as_posix()}) + "\n")
            counts[name][0] += 1
            counts[name][1] += len(text)
    for name, file in files.items():
        file.close()
        os.replace(output / f"{name}.jsonl.tmp", output / f"{name}.jsonl")
    return {name: tuple(count) for name, count in counts.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-folder", type=Path, required=True)
    parser.add_argument(
        "--max-bytes", type=int, default=0, help="stop after so much text (0 = all)"
    )
    options = parser.parse_args(argv)
    counts = write_corpora(
        Path(sysconfig.get_path("stdlib")), options.output_folder, options.max_bytes
    )
    for name, (documents, characters) in counts.items():
        print(f"{name:>9}: {documents:5} files, {characters / 1e6:6.2f} MB")
    if not counts["curated"][0] or not counts["held_out"][0]:
        print(
            "stdlib_corpus: found no curated library files; give your own text with --corpus and "
            "--curated",
            file=sys.stderr,
        )
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
