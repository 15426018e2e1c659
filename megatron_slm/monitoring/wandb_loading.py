"""Loads wandb when a run uses it, and keeps its temporary files together.

At its import wandb makes two temporary folders, and its service makes a socket; a kill leaves all
of them behind. Here they are made in one folder, which a small shell process removes as soon as
this process has ended, in whatever way.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from megatron_slm.installation import require

LONGEST_PARENT = 40
"""The path of a Unix socket ends at 107 bytes, of which this leaves 67 for two names."""


def load_wandb() -> Any:
    """The module. ModuleNotFoundError, whose message names the extra, when it is not installed."""
    if sys.modules.get("wandb", ...) is None:  # device.py keeps megatron-core from importing it
        del sys.modules["wandb"]
    require("wandb")
    import wandb

    return wandb


class TemporaryFiles:
    """A temporary folder for what wandb and its service make; gone when this process is."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        short_enough = len(parent) <= LONGEST_PARENT
        self.folder = tempfile.mkdtemp(prefix="slm-wandb-", dir=parent if short_enough else "/tmp")
        # `read` returns when the other end of the pipe is closed: when this process has ended.
        self._remover = subprocess.Popen(
            ["sh", "-c", 'trap "" INT TERM HUP; read -r _; rm -rf -- "$1"', "sh", self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a kill of the process group is what it is there for
            cwd="/",
        )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within it, temporary files are made in the folder, by this process and by those it
        starts.
        """
        before = tempfile.tempdir
        variable = os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = self.folder
        try:
            yield
        finally:
            tempfile.tempdir = before
            if variable is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = variable
