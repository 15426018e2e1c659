"""The Triton kernels' arithmetic on CPU, by Triton's own interpreter: no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter():
    """In a process of its own.

    Triton decides at its import whether it interprets, and GPU tests need it compiled.
    """
    inside = Path(__file__).with_name("interpreted_triton_kernels.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        os.fspath(inside),
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout, done.stdout
