"""The room that knows megatron-core's versions: what it refuses, and what it finds in each spec."""

import functools
import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_slm import core_versions
from megatron_slm.device import choose_device


def install(monkeypatch, version: str | None) -> None:
    """Let megatron-core seem to be installed in this version; None = not at all."""

    def stated(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(core_versions.importlib.metadata, "version", stated)


@pytest.mark.parametrize("version", ["0.16.0", "0.17.1", "0.19.0", "0.20.0", None])
def test_another_megatron_core_is_refused_by_name(monkeypatch, version):
    install(monkeypatch, version)
    with pytest.raises(ValueError, match="supported are 0.16.1 and 0.19.2") as caught:
        choose_device("cpu")
    assert f"megatron-core is {version or 'not installed'};" in str(caught.value)


@pytest.mark.parametrize("version", ["0.16.1", "0.19.2", "0.19.2+local"])
def test_a_supported_one_is_taken(monkeypatch, version):
    install(monkeypatch, version)
    assert core_versions.core_problem() == ""


@pytest.mark.parametrize(
    ("version", "arguments"), [("0.16.1", ()), ("0.19.2", ("mcore",)), ("0.19.2+x", ("mcore",))]
)
def test_the_writer_that_a_save_asks_for(monkeypatch, version, arguments):
    install(monkeypatch, version)
    assert core_versions.planned_save_arguments() == arguments


@pytest.mark.parametrize("wanted", ["0.17.1", core_versions.core_version()])
def test_the_tests_run_under_the_other_version_only(wanted):
    """tests/run.sh --core VERSION, whose environment tests/other_core.sh makes."""
    done = subprocess.run(
        ["bash", "-c", f"core={wanted}; source tests/other_core.sh"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    (other,) = set(core_versions.SUPPORTED) - {core_versions.core_version()}
    assert done.returncode == 2
    assert f"--core {wanted}: " in done.stderr
    assert f"the other one can be {other}" in done.stderr


def test_notices_are_dropped_and_nothing_else(caplog):
    core_versions.drop_notices()
    core_versions.drop_notices()
    for name, beginning in core_versions._NOTICES.items():
        logger = logging.getLogger(name)
        assert logger.filters.count(core_versions._is_no_notice) == 1
        logger.warning("%s and more", beginning)
        logger.warning("the disk is full")
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"] * 3


def test_the_parts_of_a_mixture_in_either_spec():
    parts = object()
    for mixture in (
        SimpleNamespace(submodules=parts),
        functools.partial(print, submodules=parts),
    ):
        layer = SimpleNamespace(submodules=SimpleNamespace(mlp=mixture))
        assert core_versions.mlp_parts(layer) is parts
