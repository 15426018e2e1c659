"""launch/venv.sh with stand-ins for every Python: which one it takes, what it says when none will
do, and when it installs again.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# A Python of some version: answers the questions that launch/venv.sh asks, "makes" environments
# that are links to itself, and notes its installations.
PYTHON = """#!/bin/bash
minor={minor} venv={venv}
case "$*" in
    *version_info*) [ "$minor" -ge 10 ] && [ "$minor" -le 13 ] ;;
    *ensurepip*) [ "$venv" = yes ] ;;
    --version) echo "Python 3.$minor.0" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo "$*" >>"$LOG" ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""
LOOKED_AT = ("constraints.txt", "requirements/base.txt", "pyproject.toml", "setup.py")


class Machine:
    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "cat", "cp", "mkdir", "sha256sum"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.system("Linux")
        for name in ("launch", "requirements"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "megatron_slm").mkdir()
        for name in ("requirements.txt", "constraints.txt", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, folder)
        shutil.copy(ROOT / "megatron_slm" / "__init__.py", folder / "megatron_slm")

    def has(self, name: str, minor: int, venv: str = "yes") -> Path:
        path = self.bin / name
        path.write_text(PYTHON.format(minor=minor, venv=venv))
        path.chmod(0o755)
        return path

    def system(self, name: str) -> None:
        uname = self.bin / "uname"
        uname.write_text(f"#!/bin/bash\necho {name}\n")
        uname.chmod(0o755)

    def source(self, **variables: object) -> tuple[int, str]:
        """Exit code, and what was said."""
        done = subprocess.run(
            ["bash", "-c", "set -euo pipefail; source launch/venv.sh; command -v python"],
            cwd=self.folder,
            env={
                "PATH": str(self.bin),
                "LOG": str(self.folder / "pip.log"),
                **{name: str(value) for name, value in variables.items()},
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def installations(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "there, taken",
    [
        ({"python3.13": 13, "python3.11": 11, "python3": 11}, 13),
        ({"python3.10": 10, "python3.12": 12}, 12),
        ({"python3": 10}, 10),
        ({"python3.14": 14, "python3": 14, "python": 11}, 11),
        ({"python3.13": 9, "python3.11": 11}, 11),  # a shim that runs something else
    ],
    ids=str,
)
def test_the_newest_python_that_will_do_is_taken(machine, there, taken):
    for name, minor in there.items():
        machine.has(name, minor)
    code, said = machine.source()
    assert code == 0, said
    assert f"in {machine.folder}/.venv with Python 3.{taken}.0" in said
    assert f"{machine.folder}/.venv/bin/python" in said


def test_the_python_that_is_named_is_taken(machine):
    machine.has("python3.13", 13)
    named = machine.has("mine", 11)
    assert "with Python 3.11.0" in machine.source(PYTHON=named)[1]


@pytest.mark.parametrize("minor", [9, 14])
def test_a_named_python_that_will_not_do_is_refused_and_no_other_is_taken(machine, minor):
    machine.has("python3.13", 13)
    named = machine.has("mine", minor)
    code, said = machine.source(PYTHON=named)
    assert code == 1
    assert said == f"PYTHON={named}: cannot be started, or is not Python 3.10, 3.11, 3.12 or 3.13\n"


def test_without_a_python_one_sentence_says_what_to_install(machine):
    machine.has("python3", 14)
    code, said = machine.source()
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith("Python 3.10, 3.11, 3.12 or 3.13 is needed and was not found")
    assert "Debian and Ubuntu: apt install python3 python3-venv" in said
    assert "Fedora: dnf install python3.13" in said
    assert not (machine.folder / ".venv").exists()


def test_a_python_without_venv_is_passed_over_for_one_that_has_it(machine):
    machine.has("python3.13", 13, venv="no")
    assert "python3.13 cannot make a virtual environment" in machine.source()[1]
    machine.has("python3.11", 11)
    assert "with Python 3.11.0" in machine.source()[1]


@pytest.mark.parametrize("system", ["Darwin", "MINGW64_NT-10.0"])
def test_macos_and_windows_are_refused_by_name(machine, system):
    machine.has("python3.13", 13)
    machine.system(system)
    code, said = machine.source()
    assert code == 1
    assert "this needs Linux: on macOS and Windows" in said
    assert machine.installations() == []


def test_an_active_environment_of_another_python_is_refused(machine):
    environment = machine.folder / "active"
    (environment / "bin").mkdir(parents=True)
    shutil.move(machine.has("old", 9), environment / "bin" / "python")
    code, said = machine.source(VIRTUAL_ENV=environment)
    assert code == 1
    assert f"{environment} is not Python 3.10, 3.11, 3.12 or 3.13" in said


@pytest.mark.parametrize("file", LOOKED_AT)
def test_it_installs_again_when_a_file_that_says_what_has_changed_and_only_then(machine, file):
    machine.has("python3.11", 11)
    assert machine.source()[0] == 0
    once = len(machine.installations())
    assert [line.split()[-1] for line in machine.installations()] == ["requirements.txt", "."]
    machine.source()
    assert len(machine.installations()) == once
    with (machine.folder / file).open("a") as text:
        text.write("# changed\n")
    machine.source()
    assert len(machine.installations()) == 2 * once


def test_continuous_integration_names_the_python_whose_versions_are_tested_whole():
    text = (ROOT / ".ci" / "run").read_text()
    assert text.index("export PYTHON=python3.11") < text.index("tests/run.sh")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
