"""Our .idx is megatron-core's to the byte, and a damaged one is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from megatron_slm.data.indexed import open_tokens, read_index, write_index


def write_ours(path, dtype, lengths):
    with open(path, "wb") as stream:
        write_index(stream, np.dtype(dtype), np.array(lengths, np.int32))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("lengths", [[5], [3, 1, 4, 1, 5], []])
def test_equals_megatron_core_builder(tmp_path, dtype, lengths):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for length in lengths:
        builder.add_document(list(range(length)), [length])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_ours(tmp_path / "ours.idx", dtype, lengths)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    index = read_index(tmp_path / "theirs.idx")
    assert index.documents == len(lengths)
    assert index.tokens == sum(lengths)
    assert index.dtype == np.dtype(dtype)
    assert index.document_starts_tokens().tolist() == [0, *np.cumsum(lengths).tolist()]
    assert len(open_tokens(tmp_path / "theirs", index)) == sum(lengths)


def test_documents_of_several_sequences(tmp_path):
    """megatron-core's builder can put several sequences in a document; reading must follow."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    builder.add_document([1, 2, 3], [2, 1])
    builder.add_document([4], [1])
    builder.finalize(str(tmp_path / "c.idx"))
    index = read_index(tmp_path / "c.idx")
    assert index.documents == 2
    assert index.document_starts_tokens().tolist() == [0, 3, 4]


def test_the_document_of_a_token_is_the_one_that_inspect_corpus_shows(tmp_path):
    """Documents of one sequence, some of them empty, and documents of several."""
    lengths = np.array([3, 0, 40, 1, 0, 0, 25], np.int32)
    with open(tmp_path / "c.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint16), lengths)
    index = read_index(tmp_path / "c.idx")
    expected = np.repeat(np.arange(len(lengths)), lengths).tolist()
    assert [index.document_at(offset) for offset in range(index.tokens)] == expected
    joined = replace(index, document_indices=np.array([0, 3, 3, 7]))
    expected = np.repeat([0, 2], [43, 26]).tolist()
    assert [joined.document_at(offset) for offset in range(joined.tokens)] == expected


def test_many_documents_cross_the_internal_pieces(tmp_path, monkeypatch):
    write_ours(tmp_path / "whole.idx", np.uint16, np.arange(1000) % 7)
    monkeypatch.setattr("megatron_slm.data.indexed._PIECE", 64)
    write_ours(tmp_path / "pieces.idx", np.uint16, np.arange(1000) % 7)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "pieces.idx").read_bytes()
    assert read_index(tmp_path / "pieces.idx").tokens == int((np.arange(1000) % 7).sum())


@pytest.mark.parametrize(
    "at, value, word",
    [
        (0, b"X", "not a megatron-core index"),
        (9, b"\x02", "version"),
        (17, b"\x07", "dtype code"),
        (18, b"\x04", "too long|truncated"),
        (34, struct.pack("<i", -3), "negative|start"),
        (34, struct.pack("<i", 7), "start"),
        (34 + 12, struct.pack("<q", 2), "start"),
        (34 + 36, struct.pack("<q", 1), "bounds"),
        (34 + 36 + 8, struct.pack("<q", 3), "backwards"),
        (34 + 36 + 24, struct.pack("<q", 9), "bounds"),
    ],
)
def test_damage_is_named(tmp_path, at, value, word):
    path = tmp_path / "c.idx"
    write_ours(path, np.uint16, [3, 1, 4])
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=word):
        read_index(path)


@pytest.mark.parametrize("size", [0, 8, 33, 34, 60, 101])
def test_truncated(tmp_path, size):
    path = tmp_path / "c.idx"
    write_ours(path, np.uint16, [3, 1, 4])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError):
        read_index(path)


def test_bin_of_the_wrong_size(tmp_path):
    write_ours(tmp_path / "c.idx", np.uint16, [3, 1])
    index = read_index(tmp_path / "c.idx")
    with pytest.raises(ValueError, match="cannot read"):
        open_tokens(tmp_path / "c", index)
    for size, word in ((6, "truncated"), (10, "too long")):
        (tmp_path / "c.bin").write_bytes(b"\0" * size)
        with pytest.raises(ValueError, match=word):
            open_tokens(tmp_path / "c", index)


def test_importing_it_loads_no_torch():
    import subprocess
    import sys

    modules = "megatron_slm.data.manifest, megatron_slm.tokenization"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
