"""A document too large to hold gives the tokens, and the rejects, that it would give in memory."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from data_tools.encoding import giant_encoding
from data_tools.reading import blocks, giant, streams
from megatron_slm.data.manifest import CorpusManifest
from tests.unit.data_tools.conftest import preprocess

GENERATOR = random.Random(3)
WORDS = [
    "\u2581",
    "def",
    "return",
    "naïve",
    "日本",
    "🙂",
    "\\",
    '"',
    "x1",
    "\t",
    "\n",
    "(a, b)",
    "é" * 5,
    "</s>",
    "    ",
]


def long_text(words: int) -> str:
    return " ".join(GENERATOR.choices(WORDS, k=words))


RECORDS = [
    {"text": "small first"},
    {"text": long_text(3000), "id": 1},
    {"text": "small between"},
    {"other": long_text(2000), "text": long_text(2500)},
    {"text": long_text(4000), "n": [1, {"a": 'b"c'}]},
    {"text": "last"},
]


@pytest.fixture
def small_limits(monkeypatch):
    """Everything beyond 4 kB is a giant, read in pieces of 97 bytes.

    Every escape and every character is cut somewhere.
    """
    for module in (blocks, streams, giant, giant_encoding):
        monkeypatch.setattr(module, "GIANT_BYTES", 4000)
    for module in (giant, giant_encoding):
        monkeypatch.setattr(module, "PIECE_BYTES", 97)
    monkeypatch.setattr(blocks, "_READ_BYTES", 512)
    monkeypatch.setattr("data_tools.reading.decompression._READ_BYTES", 512)
    # blocks are smaller than giants, as they are in earnest
    monkeypatch.setattr("data_tools.reading.inputs.plan_units.__defaults__", (1000,))
    monkeypatch.setattr(
        "data_tools.reading.streams.blocks_of_units.__kwdefaults__", {"block_bytes": 1000}
    )


def result(prefix) -> bytes:
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    return (
        Path(f"{prefix}.bin").read_bytes()
        + Path(f"{prefix}.idx").read_bytes()
        + str(manifest["sources"][0]["text_bytes"]).encode()
    )


def content(ascii_only: bool) -> bytes:
    return "".join(
        json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in RECORDS
    ).encode()


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
def test_jsonl(tmp_path, vocabulary, suffix, pack, ascii_only, request, monkeypatch):
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(pack(content(ascii_only)))
    options = ("--drop-duplicates",)
    assert preprocess([path], vocabulary, tmp_path / "whole", *options) == 0
    request.getfixturevalue("small_limits")
    giants = []
    monkeypatch.setattr(
        "data_tools.encoding.worker.scan",
        lambda document, forbidden: giants.append(1) or giant.scan(document, forbidden),
    )
    assert preprocess([path], vocabulary, tmp_path / "pieces", *options) == 0
    assert result(tmp_path / "pieces") == result(tmp_path / "whole")
    assert len(giants) == 3
    assert CorpusManifest.read(tmp_path / "pieces").documents == len(RECORDS)


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
def test_text_file(tmp_path, vocabulary, suffix, pack, request):
    path = tmp_path / f"c.txt{suffix}"
    path.write_bytes(pack(long_text(3000).encode()))
    assert preprocess([path], vocabulary, tmp_path / "whole") == 0
    request.getfixturevalue("small_limits")
    assert preprocess([path], vocabulary, tmp_path / "pieces") == 0
    assert result(tmp_path / "pieces") == result(tmp_path / "whole")


def test_duplicates_and_bounds(tmp_path, vocabulary, small_limits):
    path = tmp_path / "c.jsonl"
    text = long_text(3000)
    path.write_bytes(
        "".join(json.dumps({"text": t}) + "\n" for t in (text, "a", text, text, "a", "b")).encode()
    )
    assert preprocess([path], vocabulary, tmp_path / "c", "--drop-duplicates") == 0
    manifest = CorpusManifest.read(tmp_path / "c")
    assert manifest.documents == 3
    assert manifest.filters == {"exact duplicate": 3}
    assert preprocess([path], vocabulary, tmp_path / "d", "--max-characters", "100") == 0
    assert CorpusManifest.read(tmp_path / "d").documents == 3


LONG = "word " * 2000


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "' + LONG.encode() + b"\xff" + LONG.encode() + b'"}', "invalid UTF-8"),
        (b'{"text": "' + LONG.encode() + b'\\ud800 x"}', "lone surrogate"),
        (b'{"text": "' + LONG.encode() + b'\\ud800"}', "lone surrogate"),
        (b'{"text": "' + LONG.encode() + b'\\u0000"}', "NUL bytes"),
        (b'{"text": "' + LONG.encode() + b'\\q"}', "broken JSON"),
        (b'{"text": "' + LONG.encode() + b"\\u12", "broken JSON"),
        (b'{"text": "' + LONG.encode() + b"\x01" + b'"}', "broken JSON"),
        (b'{"text": "' + LONG.encode(), "broken JSON"),
        (b'{"text": "' + LONG.encode() + b'"', "broken JSON"),
        (b'{"text": "' + b" " * 9000 + b'"}', "empty text"),
        (b'{"body": "' + LONG.encode() + b'"}', "missing key"),
        (b'["' + LONG.encode() + b'"]', "not a JSON object"),
        (b'{"text": ["' + LONG.encode() + b'"]}', "wrong type"),
        (b'{"text": "x", "n": [' + b"1," * 9000 + b"1]}", "too long a record"),
        (b'{"text": "' + b"a" * 20000 + b'"}', "too long to encode"),
    ],
)
def test_complaints(tmp_path, vocabulary, small_limits, line, reason):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    assert preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "1") == 0
    manifest = CorpusManifest.read(tmp_path / "c")
    assert manifest.documents == 2
    assert manifest.rejected["reasons"] == {reason: 1}
    listed = [
        json.loads(entry) for entry in (tmp_path / "c.rejects.jsonl").read_text().splitlines()
    ]
    assert listed[0]["line"] == 2
    assert not list(tmp_path.glob("**/spill*"))


def test_without_a_proof_a_giant_is_refused(tmp_path, vocabulary, small_limits):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content(True))
    assert (
        preprocess(
            [path], vocabulary, tmp_path / "c", "--encoder", "plain", "--max-bad-fraction", "1"
        )
        == 0
    )
    assert CorpusManifest.read(tmp_path / "c").rejected["reasons"] == {
        "too large for this vocabulary": 3
    }
