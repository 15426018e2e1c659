"""Run a reference model over a corpus and store each token's loss at the token's offset.

Shards are fixed ranges of tokens; data-parallel ranks and array jobs take them in turn and never
wait for each other. A shard is scored by one model-parallel group in fixed batches and written
whole, so a run that is killed at any moment and started again ends with the same bytes.

B = windows of one micro-batch, S = padded inputs of a window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_slm.data.batch import Batch, plain_batch
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.score_manifest import ScoreManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.progress import ProgressBar
from megatron_slm.scoring.summary import pending_shards
from megatron_slm.scoring.windows import Window, WindowPlan, batches, padded_lengths


class TokenStream:
    """The tokens of a corpus by absolute offset, and where its documents begin. A document is a
    sequence of the .idx.
    """

    def __init__(self, prefix: str):
        index = read_index(f"{prefix}.idx")
        self.tokens = open_tokens(prefix, index)
        self.document_starts = index.non_empty_starts_tokens()

    def plan(self, manifest: ScoreManifest) -> WindowPlan:
        return WindowPlan(
            len(self.tokens),
            self.document_starts,
            manifest.window_tokens,
            manifest.stride_tokens,
            manifest.document_policy,
        )


@dataclass(frozen=True)
class ReferenceRunner:
    """Scores ranges of a corpus. `forward` runs the model: through megatron-core (model.py) or
    transformers (foreign_model.py).
    """

    stream: TokenStream
    plan: WindowPlan
    columns: tuple[str, ...]
    micro_batch_size: int
    forward: Callable[[list[Batch]], list[dict[str, np.ndarray]]]
    """Batches of one shape -> the columns of each batch, [B, S]; [] on ranks without the losses."""
    collects: bool = True
    """Whether this rank has the losses and writes them: one rank of each model-parallel group."""
    length_divisor: int = 1
    """What the parallel layout needs a sequence to be a multiple of."""
    batches_per_call: int = 1
    """Micro-batches per call of `forward`."""
    finish: Callable[[], None] = lambda: None
    """Called when this rank has no range left, while others may still have some."""

    def score_range(
        self, start: int, end: int, progress: ProgressBar | None = None
    ) -> dict[str, np.ndarray]:
        """fp32 values of the tokens [start, end) per column, NaN at first tokens of documents; {}
        on ranks without losses.

        Every rank of the model-parallel group calls it with the same range.
        """
        values = {column: np.full(end - start, np.nan, np.float32) for column in self.columns}
        for length, calls in self._calls(list(self.plan.windows(start, end))):
            outputs = self.forward([self._batch(windows, length) for windows in calls])
            if self.collects:
                for windows, output in zip(calls, outputs, strict=True):
                    _place(values, start, windows, output)
            if progress is not None:
                for windows in calls:
                    progress.advance(sum(w.score_end - w.score_start for w in windows))
        for column in values.values():
            column[self.plan.first_tokens(start, end) - start] = np.nan
        return values if self.collects else {}

    def _calls(self, windows: list[Window]) -> Iterator[tuple[int, list[list[Window]]]]:
        """Micro-batches of one length, several in a call, so that pipeline stages overlap."""
        lengths = padded_lengths(
            self.plan.window_tokens, self.plan.document_policy, self.length_divisor
        )
        pending: list[list[Window]] = []
        pending_length = 0
        for length, members in batches(windows, self.micro_batch_size, lengths):
            if pending and (length != pending_length or len(pending) == self.batches_per_call):
                yield pending_length, pending
                pending = []
            pending_length = length
            pending.append(members)
        if pending:
            yield pending_length, pending

    def _batch(self, windows: list[Window], length: int) -> Batch:
        tokens_BS = np.zeros((self.micro_batch_size, length), np.int64)
        labels_BS = np.zeros_like(tokens_BS)
        for row, window in enumerate(windows):
            read = self.stream.tokens[window.first : window.last + 1]
            tokens_BS[row, : window.inputs] = read[:-1]
            labels_BS[row, : window.inputs] = read[1:]
        return plain_batch(tokens_BS, labels_BS)


def _place(
    values: dict[str, np.ndarray], start: int, windows: list[Window], output: dict[str, np.ndarray]
) -> None:
    """Copy each window's scored tokens to their offsets in the corpus.

    Input i of a window predicts token first + i + 1 (docs/method.md#point-11).
    """
    for row, window in enumerate(windows):
        inputs = slice(window.score_start - 1 - window.first, window.score_end - 1 - window.first)
        scored = slice(window.score_start - start, window.score_end - start)
        for column, value_BS in output.items():
            values[column][scored] = value_BS[row, inputs]


@dataclass(frozen=True)
class ScoringReport:
    """What one call of score_corpus did, over all ranks."""

    shards_written: int
    without_score: dict[str, int]
    """Tokens for which the reference gave no finite value, in the shards that this call wrote;
    first tokens of documents are not counted.
    """


def score_corpus(
    runner: ReferenceRunner,
    store: ScoreStore,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    job_slice: tuple[int, int] = (0, 1),
    show_progress: bool = False,
) -> ScoringReport:
    """Score every unfinished shard of this job's slice and write it. Every rank calls it; then one
    calls `store.finish()`.

    job_slice = (i, n): this job takes the shards s with s % n == i, so array jobs with the same n
    never write the same shard.
    """
    pending = _from_rank_0(pending_shards(store, job_slice))
    rank_shards = pending[dp_rank::dp_size]
    counts = np.zeros(1 + len(store.columns), np.int64)
    all_tokens = _tokens_of(store.manifest, pending)
    rank_tokens = _tokens_of(store.manifest, rank_shards)
    with ProgressBar(all_tokens, rank_tokens, shown=show_progress) as progress:
        for shard in rank_shards:
            start, end = store.manifest.shard_range(shard)
            values = runner.score_range(start, end, progress)
            if runner.collects:
                marker = store.write_shard(shard, values)
                first_tokens = len(runner.plan.first_tokens(start, end))
                unexpected = [
                    marker.without_score[column] - first_tokens for column in store.columns
                ]
                counts += [1, *unexpected]
        runner.finish()
    written, *without = _sum_over_ranks(counts).tolist()
    return ScoringReport(written, dict(zip(store.columns, without, strict=True)))


def _tokens_of(manifest: ScoreManifest, shards: list[int]) -> int:
    ranges = map(manifest.shard_range, shards)
    return sum(end - start for start, end in ranges)


def rescore(
    runner: ReferenceRunner, store: ScoreStore, count: int, seed: int = 0
) -> dict[str, float]:
    """Score `count` random windows again; the largest absolute difference from the store in each
    column, in nats.

    Values are rounded to the store's dtype before they are compared. A token that has a score on
    one side only counts as infinitely different.
    """
    random = np.random.RandomState(seed)
    worst = dict.fromkeys(store.columns, 0.0)
    for _ in range(count):
        start = int(random.randint(0, store.manifest.corpus_tokens))
        end = min(start + store.manifest.window_tokens, store.manifest.corpus_tokens)
        for column, values in runner.score_range(start, end).items():
            stored = store.read(column, start, end - start)
            again = values.astype(store.manifest.numpy_dtype).astype(np.float32)
            both = np.isnan(stored) & np.isnan(again)
            difference = np.where(both, 0.0, np.nan_to_num(np.abs(stored - again), nan=np.inf))
            worst[column] = max(worst[column], float(difference.max()))
    return worst


def _from_rank_0(value: list[int]) -> list[int]:
    """World rank 0's value on every rank: a rank that starts later would otherwise find other
    shards finished.
    """
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _sum_over_ranks(counts: np.ndarray) -> np.ndarray:
    """The sum over all ranks. When it returns, every rank has written its last shard."""
    if not dist.is_initialized():
        return counts
    by_rank = [counts] * dist.get_world_size()
    dist.all_gather_object(by_rank, counts)
    return np.sum(by_rank, axis=0)
