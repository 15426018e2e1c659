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


def write_versions(folder: Path) -> None:
    """Python, packages, git revision and command, so that the run folder stands alone."""
    lines = [
        f"megatron-slm {megatron_slm.__version__}",
        f"command {redacted(' '.join(sys.argv))}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        *(f"{package} {_installed(package)}" for package in PACKAGES),
    ]
    lines += [f"scorer file {line}" for line in loaded_scorer_files()]
    lines += [f"file of a part {line}" for line in loaded_part_files()]
    lines.append(f"git {_revision() or 'not a git checkout'}")
    (folder / "versions.txt").write_text("\n".join(lines) + "\n")


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
