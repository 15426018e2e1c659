"""Fill a score store with scores made elsewhere: arrays, jsonl of per-token log-probabilities, or
the losses of a Hugging Face causal model, which is run here.

Such a store has the same layout, shards and checks as one that is scored here. Values are nats, the
higher the less likely the token (a loss); the first token of each document becomes NaN.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_slm.config.schema import ParallelConfig
from megatron_slm.data.file_array import FileArray, ReadOnlyFile, open_npy
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.corpus import TokenStream, score_corpus
from megatron_slm.scoring.foreign_model import transformers_runner
from megatron_slm.scoring.import_options import ImportOptions
from megatron_slm.scoring.progress import ProgressBar
from megatron_slm.scoring.windows import WindowPlan

TIMEOUT_MINUTES = 24 * 60
_RAW_DTYPES: dict[int, np.dtype] = {2: np.dtype("<f2"), 4: np.dtype("<f4")}


def import_job(store: ScoreStore, options: ImportOptions, corpus: CorpusManifest) -> None:
    """Fill the unfinished shards of this job's slice from the source that the options name."""
    stream = TokenStream(options.corpus)
    if options.arrays:
        arrays = {name: read_array(path, corpus.tokens) for name, path in options.arrays}
        import_arrays(store, stream, arrays, show_progress=True)
    elif options.jsonl:
        import_jsonl(store, stream, options.jsonl, key=options.key, show_progress=True)
    else:
        _run_huggingface(store, stream, options, corpus)


def _run_huggingface(
    store: ScoreStore, stream: TokenStream, options: ImportOptions, corpus: CorpusManifest
) -> None:
    """Score with a Hugging Face model, whole in every process of the job; they take the shards in
    turn.
    """

    def score(device: str | torch.device, rank: int, processes: int) -> None:
        runner = transformers_runner(
            options.huggingface,
            stream,
            stream.plan(store.manifest),
            store.columns,
            micro_batch_size=options.micro_batch_size,
            vocabulary_size=corpus.tokenizer["vocabulary_size"],
            precision=options.precision,
            device=device,
        )
        score_corpus(
            runner,
            store,
            dp_rank=rank,
            dp_size=processes,
            job_slice=options.job_slice,
            show_progress=rank == 0,
        )

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        score(options.device, 0, 1)
        return
    from megatron_slm.device import choose_device, set_threads

    device = choose_device(options.device)  # before anything imports megatron.core
    set_threads()
    from megatron_slm.parallel import join_job, leave_job

    # The first process that is done waits for the slowest, which may still have a whole shard.
    groups = join_job(ParallelConfig(), device, seed=0, timeout_minutes=TIMEOUT_MINUTES)
    try:
        score(device.torch_device, groups.world_rank, groups.world_size)
    finally:
        leave_job()


def read_array(path: str | Path, tokens: int) -> FileArray:
    """A 1-D array of one value per token, read on access.

    It is a .npy of any float dtype, or raw little-endian fp16 or fp32 (distinguished by size).
    """
    path = Path(path)
    if path.suffix == ".npy":
        array = open_npy(path)
        if array.shape != (tokens,) or array.dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: shape {array.shape}, dtype {array.dtype}; expected one number for each "
                f"of the corpus's {tokens} tokens, shape ({tokens},)"
            )
        return array
    file = ReadOnlyFile(path)
    size_bytes = file.size_bytes
    for width_bytes, dtype in _RAW_DTYPES.items():
        if size_bytes == width_bytes * tokens:
            return FileArray(file, dtype, tokens)
    raise ValueError(
        f"{path}: {size_bytes} bytes; the corpus has {tokens} tokens, so raw scores take "
        f"{2 * tokens} (fp16) or {4 * tokens} (fp32) bytes"
    )


def import_arrays(
    store: ScoreStore,
    stream: TokenStream,
    arrays: dict[str, FileArray],
    *,
    show_progress: bool = False,
) -> None:
    """Fill the store's missing shards from one array per column; value i is that of token i."""
    plan = stream.plan(store.manifest)
    missing_tokens = sum(end - start for start, end in store.missing_ranges())
    with ProgressBar(missing_tokens, missing_tokens, shown=show_progress) as progress:
        for shard in sorted(store.missing):
            start, end = store.manifest.shard_range(shard)
            values = {
                column: np.array(array[start:end], np.float64) for column, array in arrays.items()
            }
            _write(store, plan, shard, values)
            progress.advance(end - start)


def import_jsonl(
    store: ScoreStore,
    stream: TokenStream,
    path: str | Path,
    *,
    key: str = "logprobs",
    column: str = "loss",
    show_progress: bool = False,
) -> None:
    """Fill the store's missing shards from one JSON record per document of the corpus, in order.

    A record is {key: [log-probability of each token]}; that of the first token is ignored, and may
    be null. A record may also hold "token_ids", which must then be the document's. ValueError names
    the document and line that differs.
    """
    if store.columns != (column,):
        raise ValueError(
            f"The store has the columns {', '.join(store.columns)}; a jsonl file fills exactly "
            f"one, {column}."
        )
    manifest = store.manifest
    plan = stream.plan(manifest)
    pending: list[np.ndarray] = []
    read_tokens = 0
    shard = 0
    tokens = manifest.corpus_tokens
    with ProgressBar(tokens, tokens, shown=show_progress) as progress:
        for losses in _documents_of_jsonl(Path(path), stream, key):
            pending.append(losses)
            read_tokens += len(losses)
            while shard < manifest.shard_count and read_tokens >= manifest.shard_range(shard)[1]:
                start, end = manifest.shard_range(shard)
                joined = np.concatenate(pending)
                if shard in store.missing:
                    _write(store, plan, shard, {column: joined[: end - start].copy()})
                pending = [joined[end - start :]]
                shard += 1
                progress.advance(end - start)


def _documents_of_jsonl(path: Path, stream: TokenStream, key: str) -> Iterator[np.ndarray]:
    bounds = np.append(stream.document_starts, len(stream.tokens)).tolist()
    number = 0
    with open(path, encoding="utf-8") as lines:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number + 1 >= len(bounds):
                raise ValueError(
                    f"{path} line {line_number}: more records than the corpus has documents with "
                    f"tokens ({len(bounds) - 1})"
                )
            start = bounds[number]
            end = bounds[number + 1]
            yield _losses_of_line(
                f"{path} line {line_number} (document {number})",
                line,
                key,
                stream.tokens[start:end],
            )
            number += 1
    if number + 1 < len(bounds):
        raise ValueError(
            f"{path}: {number} records for {len(bounds) - 1} documents; it ends before the corpus "
            "does"
        )


def _losses_of_line(where: str, line: str, key: str, tokens: np.ndarray) -> np.ndarray:
    try:
        record = json.loads(line)
        values = np.array([np.nan if value is None else value for value in record[key]], np.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{where}: expected {{{key!r}: [numbers]}}, got {line[:80]!r} ({error})"
        ) from None
    if len(values) != len(tokens):
        raise ValueError(
            f"{where}: {len(values)} log-probabilities for {len(tokens)} tokens. Both must come "
            "from the same tokenizer, with the closing end-of-document token counted."
        )
    if "token_ids" in record and not np.array_equal(record["token_ids"], tokens):
        raise ValueError(
            f"{where}: its token_ids are not the document's; the scores were made with another "
            "tokenizer or another order of documents"
        )
    if np.nanmax(values[1:], initial=-1.0) > 1e-3:
        raise ValueError(
            f"{where}: a log-probability of {np.nanmax(values[1:]):.4g}, above 0; natural "
            "logarithms of probabilities are expected, not losses"
        )
    return -values


def _write(store: ScoreStore, plan: WindowPlan, shard: int, values: dict[str, np.ndarray]) -> None:
    start, end = store.manifest.shard_range(shard)
    for column in values.values():
        column[plan.first_tokens(start, end) - start] = np.nan
    store.write_shard(shard, values)
