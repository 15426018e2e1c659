"""Every Triton kernel's arithmetic on CPU, by Triton's own interpreter: no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

FILES = {
    "interpreted_cross_entropy.py": 15,
    "interpreted_layer_passes.py": 35,
    "interpreted_row_moves.py": 25,
}
"""The files of such tests, with the number of tests in each."""


def test_kernels_in_the_interpreter():
    """In a process of their own: Triton decides at its import whether it interprets, and GPU tests
    need it compiled. In one: starting it takes longer than most of its tests.
    """
    here = Path(__file__).parent
    assert {path.name for path in here.glob("interpreted_*.py")} == {*FILES}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            *(os.fspath(here / name) for name in FILES),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sum(FILES.values())} passed" in done.stdout, done.stdout
