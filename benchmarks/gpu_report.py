"""The file of `python -m benchmarks.gpu`: on what it was measured, every row, and the table."""

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_slm.files.atomic import write_json_atomically, write_text_atomically

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "liger-kernel",
)
ROOT = Path(__file__).resolve().parents[1]


def setting() -> dict[str, Any]:
    """What the figures depend on: a run is only continued where all of it is the same."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _driver(),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "machine": platform.node(),
        "packages": {name: _version(name) for name in PACKAGES},
        "revision": _git("describe", "--always", "--dirty", "--abbrev=40") or "not a git checkout",
        "changes_sha256": hashlib.sha256(_git("diff", "HEAD").encode()).hexdigest()[:16],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else "unknown"


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


class Report:
    """Rows by part and case, on disk after every one of them."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path = path
        self.content = content

    @classmethod
    def start(cls, path: Path, smoke: bool) -> "Report":
        content = {
            "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
            "smoke": smoke,
            "setting": setting(),
            "ceilings": None,
            "rows": {},
        }
        return cls(path, content)

    def continues(self, earlier: dict[str, Any]) -> str:
        """Why an earlier file cannot be continued here; "" = its rows are taken over."""
        now, then = self.content["setting"], earlier.get("setting", {})
        changed = [name for name in now if now[name] != then.get(name)]
        if earlier.get("smoke") != self.content["smoke"]:
            changed.append("smoke")
        if changed:
            name = changed[0]
            return f"{name} was {then.get(name)!r} there and is {now.get(name)!r} here"
        self.content["rows"] = earlier["rows"]
        self.content["ceilings"] = earlier["ceilings"]
        return ""

    def done(self, part: str) -> set[str]:
        """Cases of a part that need no second run; those that failed do."""
        rows = self.content["rows"].get(part, {})
        return {case for case, row in rows.items() if "failed" not in row}

    def add(self, part: str, row: dict[str, Any]) -> None:
        if "ceilings" in row:
            self.content["ceilings"] = row
        else:
            self.content["rows"].setdefault(part, {})[row["case"]] = row
        self.write()

    def write(self) -> None:
        """The JSON file, and the table beside it under the same name with .md."""
        write_json_atomically(self.path, self.content)
        write_text_atomically(self.path.with_suffix(".md"), markdown(self.content))

    @property
    def bad(self) -> list[str]:
        """Cases that missed their gate or failed; in a smoke run those that failed or are wrong."""
        return [
            f"{part} {case}"
            for part, rows in self.content["rows"].items()
            for case, row in rows.items()
            if "failed" in row or self._counts_against(row)
        ]

    def _counts_against(self, row: dict[str, Any]) -> bool:
        if self.content["smoke"]:
            return not row.get("correct", True)
        return row.get("missed", False)


def markdown(content: dict[str, Any]) -> str:
    """What goes into benchmarks/RESULTS.md, or why nothing does."""
    if content["smoke"]:
        return "A smoke run on a CPU: these are no figures, and none of them belongs into a page.\n"
    found = content["setting"]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines = [
        f"`{content['command']}` on {found['gpu']} (driver {found['driver']}, CUDA {found['cuda']},"
        f" Python {found['python']}; {packages}), revision {found['revision']}.",
        "",
    ]
    if ceilings := content["ceilings"]:
        lines += [
            f"The card's own 8192³ bf16 product: {ceilings['product_tflops']} TFLOP/s; copy "
            f"{ceilings['copy_tb_s']} TB/s.",
            "",
        ]
    lines += ["| case | ours | peer | ratio or share | gate | |", "|---|--:|--:|--:|--:|---|"]
    rows = content["rows"]
    lines += [_line(row) for part in rows if part != "tests" for row in rows[part].values()]
    if "tests" in rows:
        lines += ["", "| tests/gpu | passed | failed | skipped | |", "|---|--:|--:|--:|---|"]
        lines += [_test_line(row) for row in rows["tests"].values()]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    for state in ("skipped", "failed"):
        if state in row:
            return f"| {row['case']} | – | – | – | – | {state}: {_cell(row[state])} |"
    if row["measure"] == "accuracy":
        return _accuracy_line(row)
    unit = "MiB" if row["measure"] == "memory" else "ms"
    sides = []
    for side in ("ours", "peer"):
        value = row.get(f"{side}_mib", 1000 * row.get(f"{side}_median_seconds", 0))
        sides.append(f"{value:,.1f} {unit}")
    share = row.get("share")
    figure = f"{row['ratio']:.3f}" if share is None else f"{share:.3f} of the ceiling"
    if "tokens_per_second" in row:
        figure += f" ({row['tokens_per_second']:,} tokens/s)"
    gate = row["gate"] if row.get("floor") is None else f"at least {row['floor']}"
    verdict = "missed" if row["missed"] else "met"
    judged = ["–", ""] if gate is None else [str(gate), verdict]
    cells = [row["case"], *sides, figure, *judged]
    return f"| {' | '.join(cells)} |"


def _accuracy_line(row: dict[str, Any]) -> str:
    """Shares of the exact selected set that are missing; there is no ratio to judge."""
    sides = [f"{row[f'{side}_differs_fraction']:.3%} of the set" for side in ("ours", "peer")]
    verdict = "missed" if row["missed"] else "met"
    said = f"{verdict}; {row['tokens']:,} tokens, {row['models']}"
    return f"| {row['case']} | {' | '.join(sides)} | – | {row['gate']:.1%} | {_cell(said)} |"


def _test_line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['case']} | – | – | – | {_cell(row['failed'])} |"
    said = [*row["failed_tests"], *row["skip_reasons"]]
    counts = f"{row['passed']} | {len(row['failed_tests'])} | {row['skipped_tests']}"
    return f"| {row['case']} | {counts} | {_cell('; '.join(said))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
