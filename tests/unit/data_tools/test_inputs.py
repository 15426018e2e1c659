"""Every form of input gives the same documents, in the same order, as plain jsonl."""

from __future__ import annotations

import gzip
import io
import json
from itertools import chain

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_tools.reading.blocks import lines_of_range
from data_tools.reading.inputs import find_files, plan_units, shard_of
from data_tools.reading.read import read_documents
from megatron_slm.data.manifest import CorpusManifest
from tests.unit.data_tools.conftest import preprocess

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "  two  spaces\tand a tab\r\n\n end ",
    "naïve café 日本語 🙂",
    "</s> is text",
]
MANY = [f"{text} number {n}" for n in range(50) for text in TEXTS]


def write_jsonl(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory, vocabulary) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    assert preprocess([write_jsonl(folder / "c.jsonl", MANY)], vocabulary, folder / "c") == 0
    return (folder / "c.bin").read_bytes() + (folder / "c.idx").read_bytes()


def result(prefix) -> bytes:
    return prefix.with_suffix(".bin").read_bytes() + prefix.with_suffix(".idx").read_bytes()


def as_gz(content: bytes) -> bytes:
    half = len(content) // 2  # two members, the cut inside a line
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


def as_zst(content: bytes) -> bytes:
    half = len(content) // 2
    return (
        zstandard.compress(content[:half])
        + zstandard.ZstdCompressor().compressobj().compress(b"")
        + zstandard.compress(content[half:])
    )


@pytest.mark.parametrize(
    "suffix, pack",
    [(".jsonl", bytes), (".jsonl.gz", as_gz), (".ndjson.zst", as_zst), (".json", bytes)],
)
def test_jsonl_forms(tmp_path, vocabulary, expected, suffix, pack, monkeypatch):
    monkeypatch.setattr(
        "data_tools.reading.streams.blocks_of_units.__kwdefaults__", {"block_bytes": 1000}
    )
    monkeypatch.setattr("data_tools.reading.inputs.plan_units.__defaults__", (1000,))
    content = write_jsonl(tmp_path / "plain", MANY).read_bytes()
    path = tmp_path / f"c{suffix}"
    path.write_bytes(pack(content))
    assert preprocess([path], vocabulary, tmp_path / "out") == 0
    assert result(tmp_path / "out") == expected


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_line_ends_and_byte_order_mark(tmp_path, vocabulary, expected, newline, end):
    lines = write_jsonl(tmp_path / "plain", MANY).read_bytes().splitlines()
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + newline.join(lines) + end)
    assert preprocess([tmp_path / "c.jsonl"], vocabulary, tmp_path / "out") == 0
    assert result(tmp_path / "out") == expected


def test_standard_input(tmp_path, vocabulary, expected, monkeypatch):
    content = write_jsonl(tmp_path / "plain", MANY).read_bytes()
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": io.BytesIO(content)}))
    assert preprocess(["-"], vocabulary, tmp_path / "out") == 0
    assert result(tmp_path / "out") == expected


def test_parquet(tmp_path, vocabulary, expected):
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(MANY)), "text": MANY}),
        tmp_path / "c.parquet",
        row_group_size=70,
    )
    assert preprocess([tmp_path / "c.parquet"], vocabulary, tmp_path / "out") == 0
    assert result(tmp_path / "out") == expected


def test_folders_and_globs_are_ordered_by_path(tmp_path, vocabulary, expected):
    for number, text in enumerate(MANY):
        path = tmp_path / "texts" / f"{number // 100}" / f"{number:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="", encoding="utf-8")
    (tmp_path / "texts" / ".hidden").write_text("not a document")
    assert preprocess([tmp_path / "texts"], vocabulary, tmp_path / "folder") == 0
    assert preprocess([tmp_path / "texts" / "*" / "*.txt"], vocabulary, tmp_path / "glob") == 0
    assert result(tmp_path / "folder") == result(tmp_path / "glob") == expected


def test_compressed_text_file_is_one_document(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text("one document\nof two lines")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one document\nof two lines"))
    assert preprocess([tmp_path / "a.txt"], vocabulary, tmp_path / "a") == 0
    assert preprocess([tmp_path / "b.txt.gz"], vocabulary, tmp_path / "b") == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_several_keys_are_joined(tmp_path, vocabulary):
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"title": "A title", "body": "A body", "text": "no"}) + "\n"
    )
    write_jsonl(tmp_path / "joined.jsonl", ["A title\n\nA body"])
    assert (
        preprocess(
            [tmp_path / "c.jsonl"], vocabulary, tmp_path / "a", "--text-key", "title", "body"
        )
        == 0
    )
    assert preprocess([tmp_path / "joined.jsonl"], vocabulary, tmp_path / "b") == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_include_and_format(tmp_path, vocabulary):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.py").write_text("x = 1\n")
    (tmp_path / "d" / "b.txt").write_text("words\n")
    write_jsonl(tmp_path / "d" / "c.jsonl", ["one", "two"])
    for more, documents in (
        ((), 4),
        (("--include", "*.py"), 1),
        (("--include", "*.py", "*.jsonl"), 3),
        (("--format", "text"), 3),
    ):
        prefix = tmp_path / f"out{documents}{len(more)}"
        assert preprocess([tmp_path / "d"], vocabulary, prefix, *more) == 0
        assert CorpusManifest.read(prefix).documents == documents


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"a",
        b"a\n",
        b"a\nbb\nccc\n",
        b"\n\n\n",
        b"aaaaaaaaaaaaaaaa\nb",
        b"a\r\n\r\nb\r\n",
    ],
)
@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_byte_ranges_cover_every_line_once(tmp_path, content, step):
    path = tmp_path / "f"
    path.write_bytes(content)
    pieces = [
        lines_of_range(path, start, min(start + step, len(content)))[0]
        for start in range(0, len(content), step)
    ]
    assert b"".join(pieces) == content
    assert (
        all(piece.endswith(b"\n") or not piece for piece in pieces[:-1] if piece is not pieces[-1])
        or b"\n" not in content
    )


def test_shards_are_contiguous_and_complete(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_bytes(b"x" * (number * 37 % 400))
    units = plan_units(find_files([str(tmp_path)]), block_bytes=100)
    for count in (1, 2, 3, 7, len(units), len(units) + 5):
        parts = [shard_of(units, index, count) for index in range(count)]
        assert list(chain(*parts)) == units
        if count <= 3:
            assert all(parts)


def test_reading_gives_the_same_documents_to_ranks(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", MANY)
    (tmp_path / "b.txt").write_text("the last")
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    documents = list(read_documents(inputs))
    assert [document.text for document in documents] == [*MANY, "the last"]
    assert documents[2].id.endswith("a.jsonl:3")
    assert documents[-1].source == inputs[1]
    ranks = [list(read_documents(inputs, rank=rank, world_size=2)) for rank in range(2)]
    assert [document.text for part in ranks for document in part] == [*MANY, "the last"]
