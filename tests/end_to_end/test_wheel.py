"""A wheel in an empty environment: its commands run from any folder, without torch where torch is
an extra, and nothing but the library can be imported there.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_slm
from tests.source_tree import ROOT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
NEEDED_TO_BUILD = ("pyproject.toml", "setup.py", "requirements", "README.md", "LICENSE", "NOTICE")
PACKED = ("megatron_slm", "tokenizer", "data_tools", "launch")


@dataclass(frozen=True)
class Installed:
    """A virtual environment that holds the wheel and, of this environment's packages, those that
    the wheel's metadata asks for without extras.
    """

    folder: Path

    def run(self, command: str, *arguments: object) -> subprocess.CompletedProcess:
        """Run a command of the environment in an empty folder beside it."""
        elsewhere = self.folder.parent / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        return subprocess.run(
            [self.folder / "bin" / command, *map(str, arguments)],
            cwd=elsewhere,
            env={"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    def done(self, command: str, *arguments: object) -> str:
        """The standard output of a command that must succeed."""
        done = self.run(command, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commands(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "bin").glob("slm-*"))


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, built of links to it, so that the checkout stays as it is."""
    source = folder / "source"
    source.mkdir()
    for name in (*NEEDED_TO_BUILD, *PACKED):
        (source / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "absent from the `packages`" not in done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def needed(name: str, seen: dict[str, importlib.metadata.Distribution]) -> None:
    """Put a distribution and what it asks for, without extras, into `seen`."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # for another Python or system: its marker was not looked at
    if seen.setdefault(found.name.lower(), found) is not found:
        return
    for line in found.requires or []:
        if "extra ==" not in line:
            needed(re.match(r"[\w.-]+", line)[0], seen)


def link_packages(wanted: list[str], site: Path) -> None:
    """Make the files of the wanted distributions, and of what they need, visible in `site`."""
    seen: dict[str, importlib.metadata.Distribution] = {}
    for name in wanted:
        needed(name, seen)
    for distribution in seen.values():
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] != ".."}:
            link = site / top
            if top != "__pycache__" and not link.exists():
                link.symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [site] = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--no-cache-dir"]
    # Elsewhere, and without PYTHONPATH: pip would find this checkout there, and install nothing.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*pip, *options, "--disable-pip-version-check", wheel]
    subprocess.run(command, cwd=folder, env=clean, check=True)
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    asked = [
        line for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    link_packages([re.match(r"Requires-Dist: ([\w.-]+)", line)[1] for line in asked], site)
    return Installed(environment)


def test_nothing_but_the_library_can_be_imported(installed):
    code = (
        "import importlib.util as u, json\n"
        "names = 'megatron_slm tokenizer data_tools launch tests torch megatron matplotlib'\n"
        "print(json.dumps([name for name in names.split() if u.find_spec(name)]))\n"
    )
    assert json.loads(installed.done("python", "-c", code)) == ["megatron_slm"]


def test_every_command_says_its_name_and_version(installed):
    code = (
        "import contextlib, importlib.metadata as m, io, json, sys\n"
        "said = {}\n"
        "for entry in m.entry_points(group='console_scripts'):\n"
        "    if not entry.name.startswith('slm-') or entry.name == 'slm-root': continue\n"
        "    sys.argv = [entry.name, '--version']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        with contextlib.suppress(SystemExit): entry.load()()\n"
        "    said[entry.name] = out.getvalue()\n"
        "print(json.dumps(said))\n"
    )
    said = json.loads(installed.done("python", "-c", code))
    expected = {name for name in installed.commands() if name != "slm-root"}
    assert said == {name: f"{name} {megatron_slm.__version__}\n" for name in expected}


@pytest.fixture(scope="module")
def corpus(installed) -> Path:
    """A corpus of 300 documents, made by the first two steps of the chain."""
    folder = installed.folder.parent / "data"
    folder.mkdir()
    texts = [f"Text {n}, or {n * 7919}, says {'so ' * (n % 7)}and ends." for n in range(300)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    trained = ("--input", text, "--output-prefix", folder / "vocabulary", "--vocab-size", 300)
    installed.done("slm-tokenizer-train", *trained)
    read = ("--input", text, "--tokenizer", folder / "vocabulary.model", "--workers", 2)
    installed.done("slm-preprocess", *read, "--output-prefix", folder / "corpus")
    return folder / "corpus"


def test_text_becomes_a_corpus_without_a_checkout_and_without_torch(installed, corpus):
    installed.done("slm-verify", corpus)
    assert "300 documents" in installed.done("slm-inspect-corpus", corpus)


def test_what_an_extra_brings_is_named_before_anything_is_started(installed, corpus):
    root = installed.done("slm-root").strip()
    settings = ["--config", f"{root}/launch/recipes/quickstart.yaml", "--run.folder", "run"]
    settings += ["--data.train", f"[{corpus}]", "--data.validation", "[]"]
    settings += ["--data.tokenizer", str(corpus.with_name("vocabulary.model"))]
    settings += ["--data.sequence_length", "64", "--selection.scorer", "none"]
    train = installed.run("slm-train", *settings)
    assert train.returncode == 2, train.stderr
    sentence = "train: torch is not installed; pip install 'megatron-slm[train]' brings it\n"
    assert train.stderr == sentence
    local = subprocess.run(
        ["bash", f"{root}/launch/local.sh", "2", "train", *settings],
        cwd=installed.folder.parent / "elsewhere",
        env={"PATH": f"{installed.folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (local.returncode, local.stderr) == (2, sentence)


def test_a_pipeline_is_planned_from_the_wheels_own_scripts(installed):
    root = Path(installed.done("slm-root").strip())
    assert root.is_relative_to(installed.folder)
    code = f"import os, sys; os.chdir({str(root)!r}); sys.argv[0] = 'slm-submit'; "
    code += "from megatron_slm.submit import main; sys.exit(main(sys.argv[1:]))"
    folder = installed.folder.parent / "pipeline"
    described = ("--config", "launch/pipelines/quickstart.yaml", "--folder", folder)
    planned = installed.done("python", "-c", code, *described, "--dry-run", "--local")
    assert f"{root}/launch/local.sh" in planned
