"""Writes versions.txt of a run folder."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import megatron_slm
from megatron_slm.config.extension_points import loaded_part_files
from megatron_slm.files.redact import redacted
from megatron_slm.selection.scorer_files import loaded_scorer_files

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "sentencepiece",
    "numpy",
    "wandb",
    "transformers",
)
_FILE_KINDS = ("scorer file ", "file of a part ")
"""How the lines about Python files begin."""


def write_versions(folder: Path) -> None:
    """Python, packages, git revision and command, so that the run folder stands alone."""
    lines = [
        f"megatron-slm {megatron_slm.__version__}",
        f"command {redacted(' '.join(sys.argv))}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        *(f"{package} {_installed(package)}" for package in PACKAGES),
    ]
    lines += _file_lines()
    lines.append(f"git {_revision() or 'not a git checkout'}")
    (folder / "versions.txt").write_text("\n".join(lines) + "\n")


def changed_files(folder: Path) -> list[tuple[str, str]]:
    """Files of scorers and parts that were run at the start before, as versions.txt tells, and have
    other content now, as warnings. Call it before `write_versions`.
    """
    try:
        before = (folder / "versions.txt").read_text(errors="replace").splitlines()
    except OSError:
        return []
    known = dict(line.rsplit(" ", 1) for line in before if line.startswith(_FILE_KINDS))
    changed = []
    for line in _file_lines():
        name, content = line.rsplit(" ", 1)
        if known.get(name, content) != content:
            changed.append(
                (f"{name} has changed since this run was started before: {content}", "warning")
            )
    return changed


def _file_lines() -> list[str]:
    """What versions.txt says of every Python file that the settings name."""
    scorer_kind, part_kind = _FILE_KINDS
    lines = [f"{scorer_kind}{each}" for each in loaded_scorer_files()]
    lines += [f"{part_kind}{each}" for each in loaded_part_files()]
    return lines


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    source = Path(megatron_slm.__file__).parent
    found = subprocess.run(
        ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()
