"""What the tokens of a finished corpus show: problems, a sample of its text, a manifest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_tools.reading.documents import InputDataError
from megatron_slm import __version__
from megatron_slm.data.file_array import FileArray
from megatron_slm.data.indexed import CorpusIndex, open_tokens, read_index
from megatron_slm.data.manifest import FORMAT_VERSION, CorpusManifest
from megatron_slm.files.hashing import file_sha256
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences

_PIECE_TOKENS = 8 << 20
_SAMPLE_TOKENS = 2000
"""Tokens decoded of each sampled document."""


@dataclass
class TokenCounts:
    """What one pass over all tokens of a corpus counted."""

    largest_id: int = -1
    smallest_id: int = 0
    eod_tokens: int = 0
    documents_not_begun: int = 0
    documents_not_closed: int = 0
    first_not_closed: int = -1
    empty_documents: int = 0


def count_tokens(
    tokens: FileArray, index: CorpusIndex, eod_id: int, bos_id: int | None = None
) -> TokenCounts:
    """Read all tokens once; count what does not begin with `bos_id` and end with `eod_id`."""
    counts = TokenCounts()
    starts_tokens = index.document_starts_tokens()
    lengths_tokens = np.diff(starts_tokens)
    counts.empty_documents = int(np.count_nonzero(lengths_tokens == 0))
    first_places = starts_tokens[:-1][lengths_tokens > 0]
    last_places = starts_tokens[1:][lengths_tokens > 0] - 1
    pieces = range(0, len(tokens), _PIECE_TOKENS)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        for start in progress.track(pieces, description="reading tokens"):
            piece = tokens[start : start + _PIECE_TOKENS]
            counts.largest_id = max(counts.largest_id, int(piece.max()))
            counts.smallest_id = min(counts.smallest_id, int(piece.min()))
            counts.eod_tokens += int(np.count_nonzero(piece == eod_id))
            low, high = np.searchsorted(first_places, (start, start + len(piece)))
            first_ids = piece[first_places[low:high] - start]
            counts.documents_not_begun += int(np.count_nonzero(first_ids != bos_id))
            low, high = np.searchsorted(last_places, (start, start + len(piece)))
            not_closed = low + np.flatnonzero(piece[last_places[low:high] - start] != eod_id)
            if len(not_closed) and not counts.documents_not_closed:
                counts.first_not_closed = int(not_closed[0])
            counts.documents_not_closed += len(not_closed)
    return counts


def problems_of_tokens(prefix: str, manifest: CorpusManifest, counts: TokenCounts) -> list[str]:
    """A sentence for each way in which the tokens contradict the manifest."""
    size = manifest.tokenizer["vocabulary_size"]
    eod_id = manifest.tokenizer["eod_id"]
    problems = []
    if counts.largest_id >= size or counts.smallest_id < 0:
        worst = counts.largest_id if counts.largest_id >= size else counts.smallest_id
        problems.append(
            f"{prefix}.bin holds the id {worst}, but the vocabulary has ids 0 to {size - 1}: it "
            "was made with another tokenizer, or with another token dtype"
        )
    if counts.empty_documents:
        problems.append(f"{counts.empty_documents} documents have no tokens")
    if manifest.append_eod and counts.documents_not_closed:
        problems.append(
            f"{counts.documents_not_closed} documents do not end with the end-of-document id "
            f"{eod_id} (the first is document {counts.first_not_closed}), though the manifest says "
            "append_eod"
        )
    return problems


def find_tokenizer(prefix: str, manifest: CorpusManifest, path: str | None) -> Tokenizer | None:
    """The corpus's tokenizer, or None when it is gone from the manifest's path and `path` is None.

    Raises ValueError when it is not the tokenizer that the corpus was made with.
    """
    if path is None and not Path(manifest.tokenizer["path"]).exists():
        return None
    tokenizer = load_tokenizer(path or manifest.tokenizer["path"])
    if differences := tokenizer_differences(tokenizer.entry, manifest.tokenizer):
        raise ValueError(
            f"{tokenizer.path} is not the tokenizer of {prefix}; it and the manifest say: "
            f"{'; '.join(differences)}"
        )
    return tokenizer


def decode_sample(
    tokens: FileArray, index: CorpusIndex, tokenizer: Tokenizer, count: int
) -> list[tuple[int, str]]:
    """(document number, text) of `count` documents spread evenly over the corpus.

    Raises InputDataError where decoding gives no text.
    """
    starts_tokens = index.document_starts_tokens()
    spread = np.linspace(0, index.documents - 1, min(count, index.documents))
    sample = []
    for number in np.unique(spread.astype(np.int64)).tolist():
        start = starts_tokens[number]
        ids = tokens[start : min(starts_tokens[number + 1], start + _SAMPLE_TOKENS)]
        ids = ids[ids != tokenizer.eod_id]
        if tokenizer.bos_id is not None:
            ids = ids[ids != tokenizer.bos_id]
        text = tokenizer.decode(ids)
        if len(ids) and not text:
            raise InputDataError(
                f"document {number} decodes to nothing: the tokens do not belong to this tokenizer"
            )
        sample.append((number, text))
    return sample


def manifest_of_foreign_corpus(prefix: str, tokenizer: Tokenizer) -> CorpusManifest:
    """A manifest for a .bin/.idx pair that another tool wrote.

    How documents begin and end is read from the tokens.
    """
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    counts = count_tokens(tokens, index, tokenizer.eod_id, tokenizer.bos_id)
    return CorpusManifest(
        format_version=FORMAT_VERSION,
        documents=index.documents,
        tokens=index.tokens,
        token_dtype=index.dtype.name,
        bin_bytes=index.bin_bytes,
        idx_bytes=Path(f"{prefix}.idx").stat().st_size,
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        tokenizer=tokenizer.entry,
        append_eod=counts.documents_not_closed == 0 and index.documents > 0,
        prepend_bos=counts.documents_not_begun == 0 and index.documents > 0,
        sources=[{"input": "unknown"}],
        created_by={"program": "data_tools.verify", "version": __version__},
        rejected={"records": 0, "reasons": {}},
    )
