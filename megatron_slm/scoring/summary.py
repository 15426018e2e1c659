"""What is left to do of a score store, and what is printed of it at the end."""

import numpy as np

from megatron_slm.data.score_store import ScoreStore

IN_NATS = ("loss", "entropy")
"""Columns made elsewhere may hold anything."""


def pending_shards(store: ScoreStore, job_slice: tuple[int, int]) -> list[int]:
    """The unfinished shards of slice i of n, in order: those with shard % n == i."""
    number, jobs = job_slice
    return [shard for shard in sorted(store.missing) if shard % jobs == number]


def finish(store: ScoreStore) -> str:
    """Complete the store when every shard is finished; describes the state it is in.

    Reads every byte once more, unless the store was complete before and its files have not been
    written to since.
    """
    if store.manifest.complete:
        ScoreStore.open(store.folder)
        return "complete"
    if store.finish():
        return "complete"
    return f"{len(store.missing)} of {store.manifest.shard_count} shards are still missing"


def means(store: ScoreStore) -> str:
    """The mean of every column over the tokens with a score in the finished shards.

    For example "mean loss 3.4521 nats over 1,048,576 tokens".
    """
    described = []
    for column in store.columns:
        total = 0.0
        count = 0
        for shard in sorted(set(range(store.manifest.shard_count)) - store.missing):
            start, end = store.manifest.shard_range(shard)
            values = store.read(column, start, end - start)
            total += float(np.nansum(values, dtype=np.float64))
            count += int(np.count_nonzero(~np.isnan(values)))
        if count:
            unit = " nats" if column in IN_NATS else ""
            described.append(f"mean {column} {total / count:.4f}{unit} over {count:,} tokens")
    return ", ".join(described) or "no token has a score"
