"""Scores made elsewhere: arrays, jsonl of per-token log-probabilities, or any Hugging Face causal model.

A store from here is as good as one of our own: same layout, same shards, same checks. Values are nats, the higher the less
likely the token (a loss); first tokens of documents are set to NaN like everywhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_slm.data.batch import Batch
from megatron_slm.data.file_array import FileArray, ReadOnlyFile, open_npy
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.corpus import ReferenceRunner, TokenStream
from megatron_slm.scoring.progress import ProgressBar
from megatron_slm.scoring.windows import WindowPlan

if TYPE_CHECKING:
    from torch import Tensor

_RAW_DTYPES = {2: np.dtype("<f2"), 4: np.dtype("<f4")}


def read_array(path: str | Path, tokens: int) -> FileArray:
    """A 1-D array of one value per token, read where it is asked for.

    It is a .npy of any float dtype, or raw little-endian fp16 or fp32 (told apart by size).
    """
    path = Path(path)
    if path.suffix == ".npy":
        array = open_npy(path)
        if array.shape != (tokens,) or array.dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: shape {array.shape}, dtype {array.dtype}; expected one number for each of the corpus's {tokens} tokens, shape ({tokens},)"
            )
        return array
    file = ReadOnlyFile(path)
    size_bytes = file.size_bytes
    dtype = next(
        (dtype for width, dtype in _RAW_DTYPES.items() if size_bytes == width * tokens), None
    )
    if dtype is None:
        raise ValueError(
            f"{path}: {size_bytes} bytes; the corpus has {tokens} tokens, so raw scores take {2 * tokens} (fp16) or {4 * tokens} (fp32) bytes"
        )
    return FileArray(file, dtype, tokens)


def import_arrays(
    store: ScoreStore,
    stream: TokenStream,
    arrays: dict[str, FileArray],
    *,
    show_progress: bool = False,
) -> None:
    """Fill the store's missing shards from one array per column, value i belonging to token i of the corpus."""
    plan = stream.plan(store.manifest)
    with ProgressBar(*[_missing_tokens(store)] * 2, shown=show_progress) as progress:
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
    """One JSON record per document of the corpus, in order: {key: [log-probability of each token, the first ignored or null]}.

    A record may also carry "token_ids", which must then be the document's. ValueError names the document and line that differs.
    """
    if store.columns != (column,):
        raise ValueError(
            f"The store has the columns {', '.join(store.columns)}; a jsonl file fills exactly one, {column}."
        )
    plan = stream.plan(store.manifest)
    pending, offset, shard = [], 0, 0
    with ProgressBar(*[store.manifest.corpus_tokens] * 2, shown=show_progress) as progress:
        for losses in _documents_of_jsonl(Path(path), stream, key):
            pending.append(losses)
            offset += len(losses)
            while (
                shard < store.manifest.shard_count
                and offset >= store.manifest.shard_range(shard)[1]
            ):
                start, end = store.manifest.shard_range(shard)
                held = np.concatenate(pending)
                if shard in store.missing:
                    _write(store, plan, shard, {column: held[: end - start].copy()})
                pending, shard = [held[end - start :]], shard + 1
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
                    f"{path} line {line_number}: more records than the corpus has documents with tokens ({len(bounds) - 1})"
                )
            start, end = bounds[number], bounds[number + 1]
            yield _losses_of_line(
                f"{path} line {line_number} (document {number})",
                line,
                key,
                stream.tokens[start:end],
            )
            number += 1
    if number + 1 < len(bounds):
        raise ValueError(
            f"{path}: {number} records for {len(bounds) - 1} documents; it ends before the corpus does"
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
            f"{where}: {len(values)} log-probabilities for {len(tokens)} tokens. Both must come from the same tokenizer, with the "
            "closing end-of-document token counted."
        )
    if "token_ids" in record and not np.array_equal(record["token_ids"], tokens):
        raise ValueError(
            f"{where}: its token_ids are not the document's; the scores were made with another tokenizer or another order of documents"
        )
    if np.nanmax(values[1:], initial=-1.0) > 1e-3:
        raise ValueError(
            f"{where}: a log-probability of {np.nanmax(values[1:]):.4g}, above 0; natural logarithms of probabilities are expected, not losses"
        )
    return -values


def _write(store: ScoreStore, plan: WindowPlan, shard: int, values: dict[str, np.ndarray]) -> None:
    start, end = store.manifest.shard_range(shard)
    for column in values.values():
        column[plan.first_tokens(start, end) - start] = np.nan
    store.write_shard(shard, values)


def _missing_tokens(store: ScoreStore) -> int:
    return sum(end - start for start, end in store.missing_ranges())


def transformers_runner(
    folder: str | Path,
    stream: TokenStream,
    plan: WindowPlan,
    columns: tuple[str, ...],
    *,
    micro_batch_size: int = 1,
    vocabulary_size: int,
    precision: str = "fp32",
    device: str = "cpu",
) -> ReferenceRunner:
    """Losses (and entropies) of any causal model that transformers can open from a local folder, in this process.

    The model's own logits are taken to fp32. At precision bf16 the logits themselves are rounded,
    which moves 0.5 to 4 % of the selection (docs/method.md#point-16): use fp32 where memory allows,
    or import the model into this project and score with it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = (
        AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, local_files_only=True
        )
        .to(device)
        .eval()
    )
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocabulary_size:
        raise ValueError(
            f"{folder} knows {rows} tokens, the corpus's tokenizer has {vocabulary_size}: they do not belong together"
        )

    @torch.no_grad()
    def forward(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
        made = []
        for batch in batches:
            logits_BSV = model(input_ids=batch.tokens_BS.to(device), use_cache=False).logits
            # Rows beyond the tokenizer's ids are padding and can never be right
            # (docs/method.md#point-17).
            log_p = [
                logits_SV[:, :vocabulary_size].float().log_softmax(-1) for logits_SV in logits_BSV
            ]
            labels_BS = batch.labels_BS.to(device)
            made.append(
                {
                    name: torch.stack(
                        [
                            _column(name, log_p_SV, labels_S)
                            for log_p_SV, labels_S in zip(log_p, labels_BS, strict=True)
                        ]
                    )
                    .cpu()
                    .numpy()
                    for name in columns
                }
            )
        return made

    return ReferenceRunner(stream, plan, columns, micro_batch_size, forward)


def _column(name: str, log_p_SV: "Tensor", labels_S: "Tensor") -> "Tensor":
    """A column of one sequence [S], fp32, in nats: the loss of its labels, or the entropy."""
    import torch

    if name == "loss":
        return -log_p_SV.gather(-1, labels_S[:, None])[:, 0]
    return torch.special.entr(log_p_SV.exp()).sum(-1)
