"""Runs a file of tests in a process whose Triton interprets its kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_in_interpreter(name: str, tests: int) -> None:
    """Assert that the `tests` tests of the file `name` in this folder pass.

    In a process of its own: Triton decides at its import whether it interprets, and GPU tests need
    it compiled.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        os.fspath(Path(__file__).with_name(name)),
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tests} passed" in done.stdout, done.stdout
