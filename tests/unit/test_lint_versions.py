"""One version of ruff for everybody: another one formats differently."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_pre_commit_runs_the_version_that_is_installed():
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (
        repository for repository in hooks if repository["repo"].endswith("/ruff-pre-commit")
    )
    assert ruff["rev"] == f"v{pinned[1]}"
    assert {hook["id"] for hook in ruff["hooks"]} == {"ruff-check", "ruff-format"}
