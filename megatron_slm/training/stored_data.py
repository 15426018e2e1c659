"""Reads corpora and score stores again while a run trains: a disk may give other bytes than it once
did, with nothing in the file's size or times to show it.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from megatron_slm.data.corpora import Corpus
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.data.verified import StoredBlocks, forget_cached

Check = Callable[[], None]


class StoredDataCheck:
    """A thread on the first process of each node. Use as a context manager around the run's loop.

    At every interval it reads one block of each corpus and one finished shard of each score store,
    in a random order that visits each once before any of them twice. A file that was removed or
    replaced is left out: the run keeps reading the file it has opened, and the next start compares
    the new one.

    interval_seconds: 0 = nothing is read and no thread is started.
    """

    def __init__(self, corpora: Sequence[Corpus], interval_seconds: float):
        self._interval_seconds = interval_seconds
        is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self._rounds = _rounds_of(corpora) if interval_seconds and is_first else []
        self._fault: ValueError | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "StoredDataCheck":
        if self._rounds:
            self._thread = threading.Thread(target=self._watch, name="stored-data", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def fault(self) -> ValueError | None:
        """The first damage that was found; None = none so far."""
        return self._fault

    def _watch(self) -> None:
        while self._fault is None and not self._closed.wait(self._interval_seconds):
            for checks in self._rounds:
                if self._fault is None and not self._closed.is_set():
                    self._run_next(checks)

    def _run_next(self, checks: Iterator[Check]) -> None:
        try:
            for check in islice(checks, 1):
                check()
        except ValueError as error:
            self._fault = error
        except OSError:
            pass  # if training needs what cannot be read now, it raises the error itself


def _rounds_of(corpora: Sequence[Corpus]) -> list[Iterator[Check]]:
    blocks = [rounds_of_blocks(corpus.prefix) for corpus in corpora]
    return blocks + [rounds_of_shards(each.scores) for each in corpora if each.scores]


def rounds_of_blocks(prefix: str) -> Iterator[Check]:
    """Checks of the blocks of a corpus, again and again; none where no checksums are kept."""
    stored = StoredBlocks(prefix)

    def check(number: int) -> None:
        if stored.is_the_same_file():
            stored.check(number)

    return (partial(check, number) for number in _shuffled_rounds(len(stored)))


def rounds_of_shards(opened: ScoreStore) -> Iterator[Check]:
    """Checks of the finished shards of a store, again and again."""
    store = ScoreStore(opened.folder, opened.manifest, opened.missing)  # files of this thread's own
    columns = [store.column_path(column) for column in store.columns]
    before = [_identity(path) for path in columns]
    finished = sorted(set(range(store.manifest.shard_count)) - store.missing)
    value_bytes = store.manifest.numpy_dtype.itemsize

    def check(shard: int) -> None:
        if [_identity(path) for path in columns] != before:
            return
        start, end = store.manifest.shard_range(shard)
        for path in columns:
            forget_cached(path, start * value_bytes, (end - start) * value_bytes)
        store.verify(shards=[shard])

    return (partial(check, finished[place]) for place in _shuffled_rounds(len(finished)))


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _shuffled_rounds(count: int) -> Iterator[int]:
    """0 to count - 1 in a random order, then in another, without end; nothing where count is 0."""
    while count:
        # Not Python's global generator: its state is part of a run's.
        yield from random.SystemRandom().sample(range(count), count)
