"""Samples of a corpus with the stored columns of the same tokens, and blends of corpora. No torch.

The same samples as megatron-core's GPTDataset reads from the same index arrays (a test compares
the tokens). A single corpus needs no megatron-core, so any trainer can read it.

A sample is S + 1 consecutive tokens: inputs are [:-1], labels and scores are [1:]. Tokens and
scores are read through one list of ranges of absolute offsets, so a score always belongs to its
token, whatever the sequence length, shuffling, blend or epoch.

S = sequence length in tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_slm.data.blend import cached_blend, normalized
from megatron_slm.data.corpora import (
    Corpus,
    nothing_counts,
    open_corpora,  # noqa: F401 (opened, then read)
    too_few_tokens,
)
from megatron_slm.data.corpus_order import CorpusOrder, Documents
from megatron_slm.data.indexed import open_index, open_tokens
from megatron_slm.data.position import Stretch
from megatron_slm.data.score_manifest import presented_name

Sample = dict[str, np.ndarray]
MOST_CORPORA = 2**15 - 1
"""The index of a blend keeps the number of a corpus in 16 bits."""


class ScoredDataset:
    """Endless samples of one corpus, epoch after epoch. `dataset[i]` is sample i after those of
    `past`.

    A sample consists of numpy arrays, new ones at every call (GPTDataset returns its cached loss
    mask and edits it later). A document is a sequence of the .idx.

        tokens, labels, position_ids  int64 [S]
        loss_mask                     fp32 [S], 0 where the label is the first token of a document,
                                      and at padding
        corpus_id                     int64
        one per stored column         fp32 [S], under the name that scorers know; NaN = no score
        offsets                       int64 [S], absolute token offset of each label, -1 at padding;
                                      only with `with_offsets`
        document_start                int64 [S], where in the sample the document of each input
                                      begins; only with `isolate_documents`, and position_ids then
                                      begin again there
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        seed: int = 0,
        corpus_id: int = 0,
        shuffle: bool = True,
        past: Sequence[Stretch] = (),
        index_cache: str | Path | None = None,
        with_offsets: bool = False,
        isolate_documents: bool = False,
    ):
        self.isolate_documents = isolate_documents
        self.scores = corpus.scores
        self.corpus_id = corpus_id
        self.with_offsets = with_offsets
        self.sequence_length = sequence_length
        if problem := too_few_tokens(corpus, sequence_length if shuffle else 1):
            raise ValueError(problem if shuffle else nothing_counts(corpus))
        # Read, not mapped into memory: when a file is cut short while it is in use, a read names
        # it, and a map ends the process.
        self.corpus_index = index = open_index(f"{corpus.prefix}.idx")
        self.tokens = open_tokens(corpus.prefix, index)
        # The cache is keyed by content: one keyed by path would reuse the index of a corpus that
        # was made again.
        content = corpus.manifest.fingerprint.removeprefix("sha256:")[:16]
        self.order = CorpusOrder(
            Documents.of(index),
            sequence_length=sequence_length,
            seed=seed,
            shuffle=shuffle,
            past=past,
            cache=Path(index_cache) / content if index_cache else None,
        )

    def __len__(self) -> int:
        """Samples of one epoch; larger indices are later epochs."""
        return self.order.samples_per_epoch

    def pieces(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        """(corpus_id, token ranges [start, end) in it) that sample `index` is made of."""
        return self.corpus_id, self.order.pieces(int(index))

    def __getitem__(self, index: int) -> Sample:
        _, pieces = self.pieces(index)
        self.tokens.file.check_unchanged()
        if self.scores is not None:
            self.scores.check_unchanged()
        length = self.sequence_length
        read = self.tokens.read_pieces(pieces)
        inputs = read[:-1].astype(np.int64)
        labels = read[1:].astype(np.int64)
        missing = length - len(labels)
        loss_mask = np.ones(length, np.float32)
        loss_mask[len(labels) :] = 0.0
        document_start = np.zeros(length, np.int64)
        position = 0
        for start, end in pieces:
            document_start[position:] = position
            if 0 < position < len(read) and end > start:
                # This label is the first token of a document, which has no context.
                loss_mask[position - 1] = 0.0
            position += end - start
        sample: Sample = {
            "tokens": _padded(inputs, missing, 0),
            "labels": _padded(labels, missing, 0),
            "loss_mask": loss_mask,
            "position_ids": np.arange(length),
            "corpus_id": np.array(self.corpus_id, np.int64),
        }
        if self.isolate_documents:
            sample["document_start"] = document_start
            sample["position_ids"] = sample["position_ids"] - document_start
        if self.scores is not None:
            for column in self.scores.columns:
                values = self.scores.read_pieces(column, pieces)[1:]
                sample[presented_name(column)] = _padded(values, missing, np.nan)
        if self.with_offsets:
            offsets = np.concatenate([np.arange(start, end) for start, end in pieces])
            sample["offsets"] = _padded(offsets[1:], missing, -1)
        return sample


class BlendedScoredDataset:
    """Sample i of a blend. megatron-core's greedy rule chooses its corpus from (weights, i) alone,
    and each corpus is read in its own order, epoch after epoch.

    So a longer run extends a shorter one, and no blend can run out of samples.
    """

    def __init__(
        self,
        datasets: list[ScoredDataset],
        weights: Sequence[float],
        size: int,
        index_cache: str | Path | None = None,
    ):
        self.datasets = datasets
        index = cached_blend(normalized(weights), size, index_cache)
        self.dataset_index = index.dataset_index
        self.dataset_sample_index = index.dataset_sample_index

    def __len__(self) -> int:
        """Samples that the blend was planned for."""
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        corpus = self.datasets[int(self.dataset_index[index])]
        return corpus[int(self.dataset_sample_index[index])]

    def pieces(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        """As ScoredDataset.pieces."""
        corpus = self.datasets[int(self.dataset_index[index])]
        return corpus.pieces(int(self.dataset_sample_index[index]))


def training_dataset(
    corpora: Sequence[Corpus],
    *,
    sequence_length: int,
    seed: int,
    samples: int,
    weights: Sequence[float] = (),
    pasts: Sequence[Sequence[Stretch]] = (),
    index_cache: str | Path | None = None,
    with_offsets: bool = False,
    isolate_documents: bool = False,
) -> ScoredDataset | BlendedScoredDataset:
    """The training data: one corpus, or a blend by `weights` (any positive scale; none = by size in
    tokens).

    samples: how many may be read. A blend is planned for that many; a larger number keeps the order
    of the first. pasts: per corpus, what was read of it before sample 0; none = nothing.
    """
    if weights and len(weights) != len(corpora):
        raise ValueError(f"{len(weights)} blend weights were given for {len(corpora)} corpora.")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"Blend weights must be positive and finite, got {list(weights)}; leave a corpus out "
            "of data.train instead of giving it 0."
        )
    if len(corpora) > MOST_CORPORA:
        raise ValueError(
            f"A blend of {len(corpora)} corpora was given; it can be of at most {MOST_CORPORA}. "
            "Join some of them (python -m data_tools.merge)."
        )
    datasets = [
        ScoredDataset(
            corpus,
            sequence_length=sequence_length,
            seed=seed,
            corpus_id=number,
            past=pasts[number] if pasts else (),
            index_cache=index_cache,
            with_offsets=with_offsets,
            isolate_documents=isolate_documents,
        )
        for number, corpus in enumerate(corpora)
    ]
    if len(datasets) == 1:
        return datasets[0]
    return BlendedScoredDataset(
        datasets, weights or [corpus.manifest.tokens for corpus in corpora], samples, index_cache
    )


def validation_dataset(
    corpus: Corpus,
    *,
    sequence_length: int,
    index_cache: str | Path | None = None,
    with_offsets: bool = False,
    isolate_documents: bool = False,
) -> ScoredDataset:
    """A whole corpus, every token once, in an order that no seed changes.

    Its last sample is padded and masked.
    """
    return ScoredDataset(
        corpus,
        sequence_length=sequence_length,
        shuffle=False,
        index_cache=index_cache,
        with_offsets=with_offsets,
        isolate_documents=isolate_documents,
    )


def _padded(values: np.ndarray, missing: int, fill: float) -> np.ndarray:
    return np.pad(values, (0, missing), constant_values=fill) if missing else values
