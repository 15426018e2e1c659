"""What a forked writer must not do with the memory that it was forked with."""

import gc
import os
from types import SimpleNamespace

import pytest

from megatron_slm.checkpoint import writing


class Garbage:
    """A cycle that, like a process group, can only be destroyed where it was made."""

    def __init__(self, marker):
        self.itself = self
        self.marker = marker
        self.process = os.getpid()

    def __del__(self):
        if os.getpid() != self.process:
            self.marker.touch()


def make_much(bucket, transforms, sender, trainer_process):
    """In the place of writing a file: what a collector that is on would collect at."""
    made = [[] for _ in range(100_000)]
    sender.send((writing.Written(size_bytes=len(made)), ""))


@pytest.mark.parametrize("collects", [True, False])
def test_a_writer_destroys_no_garbage_of_its_trainer(collects, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_write_file", make_much)
    writer = SimpleNamespace(
        preload_tensors=lambda buckets: buckets, write_buckets=[()], transforms=None
    )
    ranks = writing.RankWriter(writer, None)
    was_on = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        Garbage(tmp_path / "destroyed")
        assert ranks.start() == ""
        written, problem = ranks.collect()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was_on else gc.disable)()
    assert problem == ""
    assert written.size_bytes == 100_000
    assert not (tmp_path / "destroyed").exists()
