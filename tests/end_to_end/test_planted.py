"""A checkpoint from a stranger runs no code in any program that reads checkpoints, wherever in it
the code is hidden.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.planted import OUTSIDE, READ_BY
from tests.end_to_end.small_run import ROOT, environment


@pytest.fixture(scope="module")
def readings(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """(place, reader) -> exit code, words, the file that holds the object, and whether its code
    ran.
    """
    folder = tmp_path_factory.mktemp("planted")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("planted.py"), folder],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["place"], line["reader"]): line for line in lines}


@pytest.mark.parametrize(
    ("place", "reader"),
    [(place, reader) for place, names in READ_BY.items() for reader in names if place != "nowhere"],
)
def test_it_is_refused_by_name_and_does_not_run(place, reader, readings):
    reading = readings[place, reader]
    assert not reading["ran"]
    assert reading["code"] == 3, reading["said"]
    refused, named = (
        (f"{reading['file']} names '{OUTSIDE}'", "refused")
        if place == "checksums.json"
        else (f"{reading['file']}: refused", "posix.mkdir")
    )
    assert f"step_00000001/{refused}" in reading["said"]
    assert named in reading["said"]
    assert len(reading["said"].splitlines()) <= 2


@pytest.mark.parametrize("reader", READ_BY["nowhere"])
def test_the_same_checkpoint_without_it_is_read(reader, readings):
    assert readings["nowhere", reader]["code"] == 0, readings["nowhere", reader]["said"]
