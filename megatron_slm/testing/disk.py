"""Records the disk operations of a program in order, for tests that a power cut loses nothing.

A file's bytes may reach the disk after the rename that made it visible. So whatever is renamed into
place must have been synced before, and the folder that holds the new name synced afterwards.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass
class DiskEvents:
    """The fsyncs and renames of this process, as they happened."""

    synced: set[tuple[int, int]] = field(default_factory=set)
    """(device, inode) of every file and folder that was synced so far."""
    unsynced_renames: list[str] = field(default_factory=list)
    """Files that a rename made visible before their bytes were on disk."""
    unsynced_names: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Renamed paths whose folder has not been synced since."""

    def fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        self.synced.add(identity)
        for name, folder in list(self.unsynced_names.items()):
            if folder == identity:
                del self.unsynced_names[name]

    def rename(self, source: Path, target: Path) -> None:
        """To be called before the rename happens."""
        files = [path for path in source.rglob("*") if path.is_file()] or [source]
        for path in files:
            if path.is_file() and _identity(path) not in self.synced:
                self.unsynced_renames.append(f"{path.name} -> {target}")
        self.unsynced_names[str(target)] = _identity(target.parent)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


@contextmanager
def recorded_disk_events() -> Iterator[DiskEvents]:
    """Record os.fsync, os.rename and os.replace (pathlib's too) while the block runs."""
    events = DiskEvents()
    real_fsync = os.fsync

    def recorded_fsync(descriptor: Any) -> None:
        real_fsync(descriptor)
        events.fsync(descriptor if isinstance(descriptor, int) else descriptor.fileno())

    def recorded(move: Callable[..., None]) -> Callable[..., None]:
        def recorded_move(source: Any, target: Any, **options: Any) -> None:
            events.rename(Path(source), Path(target))
            move(source, target, **options)

        return recorded_move

    with (
        mock.patch("os.fsync", recorded_fsync),
        mock.patch("os.rename", recorded(os.rename)),
        mock.patch("os.replace", recorded(os.replace)),
    ):
        yield events
