"""The part of the preprocessing benchmark that writes alone: gate C15 (benchmarks/RESULTS.md)."""

import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_tools.writing.writer import CorpusWriter
from megatron_slm.data.manifest import FORMAT_VERSION, CorpusManifest
from megatron_slm.files.hashing import file_sha256

DOCUMENT_TOKENS = 500
BATCH_DOCUMENTS = 500
VOCABULARY_SIZE = 32000
BUILDER = "megatron-core's IndexedDatasetBuilder"


def write(tokens: int, rounds: int) -> None:
    """Encoded documents to .bin and .idx.

    Ours gets them as bytes, in batches, as workers hand them over, and makes its checksums and its
    fsyncs. megatron-core's builder gets each as the list of ids that Megatron-LM's tool gives it.
    """
    batches = tokens // DOCUMENT_TOKENS // BATCH_DOCUMENTS
    random = np.random.RandomState(0)
    # One batch, written again and again: to either way it makes no difference.
    ids = random.randint(0, VOCABULARY_SIZE, (BATCH_DOCUMENTS, DOCUMENT_TOKENS)).astype(np.uint16)
    id_lists = ids.tolist() * batches
    id_bytes = ids.tobytes()
    ways: dict[str, Callable[[str], None]] = {
        BUILDER: lambda prefix: _by_builder(id_lists, prefix),
        "ours": lambda prefix: _by_writer(id_bytes, batches, prefix),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        digests = []
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(prefix="slm-benchmark-") as folder:
                prefix = f"{folder}/corpus"
                began = time.process_time()
                way(prefix)
                seconds[name].append(time.process_time() - began)
                digests.append([file_sha256(prefix + suffix) for suffix in (".bin", ".idx")])
        if digests[0] != digests[1]:
            raise SystemExit("the two wrote different files")
    _report({name: statistics.median(times) for name, times in seconds.items()}, batches)


def _by_builder(id_lists: list[list[int]], prefix: str) -> None:
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for document in id_lists:
        builder.add_document(document, [DOCUMENT_TOKENS])
    builder.finalize(prefix + ".idx")


def _by_writer(id_bytes: bytes, batches: int, prefix: str) -> None:
    lengths = np.full(BATCH_DOCUMENTS, DOCUMENT_TOKENS, np.int32)
    with CorpusWriter(prefix, np.dtype(np.uint16), {}) as writer:
        for _ in range(batches):
            writer.append(id_bytes)
            writer.add_documents(lengths)
        writer.finish(_manifest, {})


def _manifest(**sizes) -> CorpusManifest:
    return CorpusManifest(
        format_version=FORMAT_VERSION,
        **sizes,
        tokenizer={"vocabulary_size": VOCABULARY_SIZE},
        append_eod=True,
        sources=[],
        created_by={},
        rejected={},
    )


def _report(median_seconds: dict[str, float], batches: int) -> None:
    documents = batches * BATCH_DOCUMENTS
    print("| writer | CPU s | million tokens per CPU s |\n|---|---|---|")
    for name, seconds in median_seconds.items():
        rate = documents * DOCUMENT_TOKENS / seconds / 1e6
        print(f"| {name} | {seconds:.2f} | {rate:.0f} |")
    print(
        f"C15: {median_seconds[BUILDER] / median_seconds['ours']:.1f}x (at least 10x), "
        f"the same files byte for byte, {documents} documents of {DOCUMENT_TOKENS} tokens"
    )
