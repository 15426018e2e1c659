"""Samples with a stored score per token, beside megatron-core's dataset without; fp16 storage.

    python -m benchmarks.loader                       both parts, 100 M tokens
    python -m benchmarks.loader --part loader --tokens 1e9 --seq 2048 --scores fp16     gate C16
    python -m benchmarks.loader --part quantize                                         gate C17

Loader: all sides run in one process in alternating rounds on the same random tokens, page cache
warm; CPU seconds of one thread, medians. Every sample of the scored side is checked: the stored
score is the one of that token. A run of gate C16 makes 4 GB of files in --folder.

Quantize: which tokens a keep fraction of 0.6 selects from fp32 reference losses, and how many of
them change when those are stored coarser.

Exit code 1 when a gate is missed. The gates (C1 …, G1 …) are defined at the head of
benchmarks/RESULTS.md.
"""

import argparse
import ast
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from benchmarks.library_words import library_tokens
from benchmarks.measure import seconds_per_call
from megatron_slm.data.loader import TrainingLoader
from megatron_slm.data.score_manifest import DTYPES
from megatron_slm.data.scored_dataset import ScoredDataset, open_corpora
from megatron_slm.testing.corpora import write_corpus, write_scores

SCORED_SHARE_GATE = 0.65  # C16
CHANGED_PERCENT_GATE = 0.15  # C17
KEEP = 0.6


class ScoredByIndexedDataset(GPTDataset):
    """What one would write first: megatron-core's dataset, and the scores as a second one.

    The score column is an IndexedDataset, read document piece by document piece.
    """

    scores: IndexedDataset

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        row = self.shuffle_index[index]
        (first, begin), (last, end) = self.sample_index[row], self.sample_index[row + 1]
        parts = []
        for place in range(first, last + 1):
            offset = int(begin) if place == first else 0
            length = int(end) + 1 - offset if place == last else None
            parts.append(self.scores.get(self.document_index[place], offset=offset, length=length))
        return {
            **sample,
            "reference_loss": np.concatenate(parts).view(np.float16)[1:].astype(np.float32),
        }


def score_of(offsets: np.ndarray) -> np.ndarray:
    return (offsets % 2039) / 128


def make_files(folder: Path, tokens: int, dtype: str) -> None:
    random = np.random.RandomState(0)
    lengths = np.maximum(1, random.lognormal(6.5, 0.9, tokens // 500).astype(np.int64))
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens)]
    block = random.randint(0, 32000, 1 << 22).astype(np.uint16)
    starts = random.randint(0, len(block) - lengths.max(), len(lengths))
    write_corpus(
        folder / "corpus",
        [block[start : start + length] for start, length in zip(starts, lengths, strict=True)],
        vocabulary_size=32000,
    )
    write_scores(folder / "scores", folder / "corpus", score_of, dtype=dtype, shard_tokens=1 << 24)
    if dtype == "fp16":
        # The same column for ScoredByIndexedDataset: the bits of fp16 as a uint16 IndexedDataset
        # with the corpus's index.
        shutil.copy(folder / "corpus.idx", folder / "column.idx")
        os.link(folder / "scores" / "loss.bin", folder / "column.bin")


def stock(cls, corpus, sequence_length: int, folder: Path) -> GPTDataset:
    low_level = IndexedDataset(corpus.prefix)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([corpus.prefix], None),
        split="1,0,0",
        path_to_cache=str(folder / "stock"),
        tokenizer=SimpleNamespace(vocab_size=None, eod=0, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return cls(
        low_level,
        corpus.prefix,
        np.arange(len(low_level), dtype=np.int32),
        None,
        Split.train,
        config,
    )


def bench_loader(folder: Path, tokens: int, sequence_length: int, dtype: str, rounds: int) -> dict:
    make_files(folder, tokens, dtype)
    [corpus] = open_corpora([str(folder / "corpus")], [str(folder / "scores")])
    [plain] = open_corpora([str(folder / "corpus")])
    core = stock(GPTDataset, corpus, sequence_length, folder)
    settings = {"sequence_length": sequence_length, "seed": 1, "index_cache": folder / "cache"}
    scored, unscored = ScoredDataset(corpus, **settings), ScoredDataset(plain, **settings)
    count = min(2000, len(scored) // 2)
    indices = np.random.RandomState(2).permutation(len(scored) - 1)[:count].tolist()
    loader = TrainingLoader(scored, global_batch_size=8, micro_batch_size=8, dp_rank=0, dp_size=1)

    def read(dataset) -> Callable[[], object]:
        return lambda: [dataset[index] for index in indices]

    sides = {
        "GPTDataset, no scores": read(core),
        "ours, no scores": read(unscored),
        f"ours, {dtype} scores": read(scored),
        "ours, scores, collated by the loader": lambda: [
            loader.next_step() for _ in range(count // 8)
        ],
    }
    if dtype == "fp16":
        by_indexed = stock(ScoredByIndexedDataset, corpus, sequence_length, folder)
        by_indexed.scores = IndexedDataset(str(folder / "column"))
        sides["GPTDataset + IndexedDataset of fp16 bits"] = read(by_indexed)
    check_alignment(corpus, settings, indices, dtype)
    times = seconds_per_call(sides, "cpu", rounds)
    loader.close()
    rate = {name: count / statistics.median(seconds) for name, seconds in times.items()}
    shares = [
        a / b
        for a, b in zip(times["GPTDataset, no scores"], times[f"ours, {dtype} scores"], strict=True)
    ]
    return {
        "tokens": corpus.manifest.tokens,
        "documents": corpus.manifest.documents,
        "sequence_length": sequence_length,
        "samples_per_second": rate,
        "scored_share_of_stock": statistics.median(shares),
    }


def check_alignment(corpus, settings: dict, indices: list[int], dtype: str) -> None:
    dataset = ScoredDataset(corpus, **settings, with_offsets=True)
    for index in indices[:500]:
        sample = dataset[index]
        expected = score_of(sample["offsets"]).astype(DTYPES[dtype]).astype(np.float32)
        counted = sample["loss_mask"] == 1
        if not np.array_equal(sample["reference_loss"][counted], expected[counted]):
            raise AssertionError(f"sample {index}: a score is not that of its token")


def ngram_losses(
    train: np.ndarray, test: np.ndarray, order: int, strength: float = 4.0
) -> np.ndarray:
    """-log p of each test token by an n-gram model, each order smoothed towards the one below."""
    probability = (np.bincount(train, minlength=32000)[test] + 0.5) / (len(train) + 16000)
    for length in range(1, order):
        seen = _hashes(train, length)
        contexts = _hashes(test, length)
        both_seen = seen * np.uint64(32003) + train.astype(np.uint64)
        both = contexts * np.uint64(32003) + test.astype(np.uint64)
        counts = _counts(both_seen, both) + strength * probability
        probability = counts / (_counts(seen, contexts) + strength)
    return -np.log(probability)


def _hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A hash of the `length` tokens before each token."""
    hashed = np.zeros(len(tokens), np.uint64)
    for back in range(1, length + 1):
        hashed = (
            hashed * np.uint64(1000003)
            + np.concatenate([np.zeros(back, np.int64), tokens[:-back]]).astype(np.uint64)
            + np.uint64(1)
        )
    return hashed


def _counts(seen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    values, counts = np.unique(seen, return_counts=True)
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[place] == wanted, counts[place], 0)


def stored_as(losses: np.ndarray) -> dict[str, np.ndarray]:
    bits = losses.astype(np.float32).view(np.uint32)
    bf16 = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return {
        "fp32": losses.astype(np.float32),
        "fp16": losses.astype(np.float16).astype(np.float32),
        "bf16": bf16,
        "uint8": (np.round(np.minimum(losses, 20) / 20 * 255) / 255 * 20).astype(np.float32),
    }


def bench_quantize(tokens: int) -> dict:
    text = library_tokens(3 * tokens)
    a, b, test = np.array_split(text, 3)
    reference = ngram_losses(b, test, 4)
    random = np.random.RandomState(0)
    students = {
        "n-gram pair": ngram_losses(a, test, 3),
    }
    for scale in (0.3, 0.1):
        noise = scale * np.sqrt(reference) * random.laplace(size=len(test))
        students[f"close pair, s={scale}"] = reference + 0.03 + noise
    result = {}
    for name, student in students.items():
        kept = {
            dtype: select(student.astype(np.float32) - stored)
            for dtype, stored in stored_as(reference).items()
        }
        result[name] = {
            dtype: 100 * (kept["fp32"] & ~chosen).sum() / kept["fp32"].sum()
            for dtype, chosen in kept.items()
            if dtype != "fp32"
        }
    return {
        "tokens": len(test),
        "correlation": float(np.corrcoef(students["n-gram pair"], reference)[0, 1]),
        "changed_percent": result,
    }


def select(excess: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(excess), bool)
    chosen[np.argsort(-excess, kind="stable")[: int(np.ceil(KEEP * len(excess) - 1e-9))]] = True
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=("both", "loader", "quantize"), default="both")
    parser.add_argument(
        "--tokens",
        type=lambda text: int(ast.literal_eval(text)),
        default=100_000_000,
        help="corpus size; quantize uses at most 2 M",
    )
    parser.add_argument("--seq", type=int, default=2048, help="sequence length in tokens")
    parser.add_argument("--scores", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the files are made (default: a temporary folder)")
    options = parser.parse_args(argv)
    missed = False
    if options.part != "quantize":
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result = bench_loader(
                Path(folder), options.tokens, options.seq, options.scores, options.rounds
            )
        print(json.dumps(result, indent=1))
        missed |= result["scored_share_of_stock"] < SCORED_SHARE_GATE
    if options.part != "loader":
        result = bench_quantize(min(options.tokens, 2_000_000))
        print(json.dumps(result, indent=1))
        missed |= (
            max(pair["fp16"] for pair in result["changed_percent"].values()) > CHANGED_PERCENT_GATE
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
