"""megatron-core's GPT dataset with the stored columns of the very same tokens, and blends of several corpora.

A sample is S + 1 consecutive tokens: inputs are [:-1], labels and scores are [1:]. Tokens and scores are read through the
same list of ranges of absolute offsets, so a score cannot end up beside another token, whatever the sequence length,
shuffling, blend or epoch.

S = sequence length in tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, normalize

from megatron_slm.data.corpora import (
    Corpus,
    nothing_counts,
    open_corpora,  # noqa: F401 (opened, then read)
    too_few_tokens,
)
from megatron_slm.data.corpus_order import CorpusOrder, Documents
from megatron_slm.data.epoch_index import build_once
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import open_index, open_tokens
from megatron_slm.data.position import Stretch
from megatron_slm.data.score_manifest import presented_name

Sample = dict[str, np.ndarray]
COUNTED_AT_ONCE = 1 << 24
"""Entries of a blend's index that are copied to count them: 128 MiB as int64."""


class ScoredDataset(GPTDataset):
    """Endless samples of one corpus, epoch after epoch. `dataset[i]` is sample i after those of `past`.

    Returns numpy arrays, fresh for every call (GPTDataset hands out its cached loss mask once and then edits it):
    tokens, labels, position_ids int64 [S]; loss_mask fp32 [S], 0 where the label is the first token of a document and at
    padding; corpus_id int64; one fp32 [S] per stored column under the name scorers know, NaN = no score; with
    `with_offsets`, the absolute token offset of every label, int64 [S], -1 at padding; with `isolate_documents`, document_start
    int64 [S], where in the sample the document of each input begins, and position_ids that restart there. A document is a sequence of the .idx.
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
        self.scores, self.corpus_id, self.with_offsets = corpus.scores, corpus_id, with_offsets
        self.sequence_length = sequence_length
        if problem := too_few_tokens(corpus, sequence_length if shuffle else 1):
            raise ValueError(problem if shuffle else nothing_counts(corpus))
        # megatron-core maps both files; samples are read from these instead, which name a file
        # that is cut short meanwhile.
        self.corpus_index = index = open_index(f"{corpus.prefix}.idx")
        self.tokens = open_tokens(corpus.prefix, index)
        low_level = IndexedDataset(corpus.prefix)
        # Keyed by content: megatron-core keys its cache by path alone and reuses the index of a corpus that was made again.
        content = corpus.manifest.fingerprint.removeprefix("sha256:")[:16]
        self.order = CorpusOrder(
            Documents.of(index),
            sequence_length=sequence_length,
            seed=seed,
            shuffle=shuffle,
            past=past,
            cache=Path(index_cache) / content if index_cache else None,
        )
        everything = np.arange(len(low_level), dtype=np.int32)
        # The tokenizer shim has no pad id: a pad id that also occurs in text must not mask that text.
        tokenizer = SimpleNamespace(
            vocab_size=None,
            unique_identifiers={"fingerprint": corpus.manifest.tokenizer["fingerprint"]},
        )
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([corpus.prefix], None),
            split="1,0,0",
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        super().__init__(low_level, corpus.prefix, everything, None, Split.train, config)

    def _build_document_sample_shuffle_indices(self):
        """The first epoch, as GPTDataset wants it at construction; what is read comes from corpus_order.py."""
        first = self.order.epoch(0)
        return first.document_index, first.sample_index, first.shuffle_index

    def __len__(self) -> int:
        """Samples of one epoch; larger indices are later epochs."""
        return self.order.samples_per_epoch

    def pieces(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        """(corpus_id, token ranges [start, end) of its documents) that sample `index` is made of."""
        return self.corpus_id, self.order.pieces(int(index))

    def __getitem__(self, index: int) -> Sample:
        _, pieces = self.pieces(index)
        self.tokens.file.check_unchanged()
        if self.scores is not None:
            self.scores.check_unchanged()
        whole = self.tokens.read_pieces(pieces)
        wanted = self.sequence_length
        missing = wanted + 1 - len(whole)
        inputs, labels = whole[:-1].astype(np.int64), whole[1:].astype(np.int64)
        sample = {
            "loss_mask": np.ones(wanted, np.float32),
            "position_ids": np.arange(wanted),
            "corpus_id": np.int64(self.corpus_id),
        }
        sample["tokens"], sample["labels"] = (
            _padded(inputs, missing, 0),
            _padded(labels, missing, 0),
        )
        sample["loss_mask"][len(labels) :] = 0.0
        reached, document_start = 0, np.zeros(wanted, np.int64)
        for start, end in pieces:
            document_start[reached:] = reached
            if 0 < reached < len(whole) and end > start:
                sample["loss_mask"][reached - 1] = (
                    0.0  # this label opens a document: nothing before it explains it
                )
            reached += end - start
        if self.isolate_documents:
            sample["document_start"] = document_start
            sample["position_ids"] = sample["position_ids"] - document_start
        if self.scores is not None:
            for column in self.scores.columns:
                sample[presented_name(column)] = _padded(
                    self.scores.read_pieces(column, pieces)[1:], missing, np.nan
                )
        if self.with_offsets:
            sample["offsets"] = _padded(
                np.concatenate([np.arange(start, end) for start, end in pieces])[1:], missing, -1
            )
        return sample


class BlendedScoredDataset(BlendedDataset):
    """Sample i of a blend: the corpus is chosen by megatron-core's greedy rule from (weights, i) alone, and each corpus is
    read in its own order, epoch after epoch.

    So a longer run extends a shorter one, and no blend can run out of samples.
    """

    def __init__(
        self,
        datasets: list[ScoredDataset],
        weights: Sequence[float],
        size: int,
        index_cache: str | Path | None = None,
    ):
        self.index_cache = index_cache
        super().__init__(datasets, [float(weight) for weight in weights], size, datasets[0].config)

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        arrays = _kept_blend(self.weights, self.size, self.index_cache)
        return arrays.dataset_index, arrays.dataset_sample_index

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample.pop("dataset_id")  # corpus_id says the same
        return sample

    def pieces(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        """As ScoredDataset.pieces."""
        corpus = self.datasets[int(self.dataset_index[index])]
        return corpus.pieces(int(self.dataset_sample_index[index]))


@dataclass(frozen=True)
class BlendIndex:
    dataset_index: np.ndarray | FileArray
    """int16 [samples]: the corpus of each sample."""
    dataset_sample_index: np.ndarray | FileArray
    """int64 [samples]: how many samples of that corpus came before."""


def blend(weights: Sequence[float], size: int) -> BlendIndex:
    index = BlendIndex(np.zeros(size, np.int16), np.zeros(size, np.int64))
    helpers.build_blending_indices(
        index.dataset_index,
        index.dataset_sample_index,
        normalize(list(weights)),
        len(weights),
        size,
        False,
    )
    return index


def _kept_blend(weights: Sequence[float], size: int, index_cache: str | Path | None) -> BlendIndex:
    """The blend of weights that BlendedDataset has normalized: to do it once more can move their
    last bit, and the order.
    """
    key = sha256(repr((weights, size)).encode()).hexdigest()[:16]
    return build_once(
        Path(index_cache) / f"blend_{key}" if index_cache else None,
        BlendIndex,
        lambda: blend(weights, size),
    )


def samples_by_corpus(
    weights: Sequence[float], samples: int, index_cache: str | Path | None = None
) -> list[int]:
    """How many of the first `samples` of a blend are of each corpus; one weight, or none, is one
    corpus.
    """
    if len(weights) < 2:
        return [samples]
    counts = np.zeros(len(weights), np.int64)
    if samples:
        index = _kept_blend(normalize([float(weight) for weight in weights]), samples, index_cache)
        for start in range(0, samples, COUNTED_AT_ONCE):
            part_N = index.dataset_index[start : start + COUNTED_AT_ONCE]
            counts += np.bincount(part_N, minlength=len(counts))
    return counts.tolist()


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
    """The training data: one corpus, or a blend by `weights` (any positive scale; none = by size in tokens).

    samples: how many may be read; a blend is planned for that many, and a larger number keeps the order of the first.
    pasts: per corpus, what was read of it before sample 0; none = nothing.
    """
    if weights and len(weights) != len(corpora):
        raise ValueError(f"{len(weights)} blend weights were given for {len(corpora)} corpora.")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"Blend weights must be positive and finite, got {list(weights)}; leave a corpus out of data.train instead of giving it 0."
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
    """A whole corpus, every token once, in an order that no seed changes; its last sample is padded and masked."""
    return ScoredDataset(
        corpus,
        sequence_length=sequence_length,
        shuffle=False,
        index_cache=index_cache,
        with_offsets=with_offsets,
        isolate_documents=isolate_documents,
    )


def _padded(values: np.ndarray, missing: int, fill) -> np.ndarray:
    return np.pad(values, (0, missing), constant_values=fill) if missing else values
