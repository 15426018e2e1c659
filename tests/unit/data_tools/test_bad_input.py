"""Bad input is counted, listed with file, line and reason, and bounded.

It is never dropped silently, and never a traceback.
"""

from __future__ import annotations

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_slm.data.manifest import CorpusManifest, check_corpus
from tests.unit.data_tools.conftest import preprocess

GOOD = json.dumps({"text": "a good document"}).encode()
BAD_LINES = {
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "broken JSON": b'{"text": "x"',
    "missing key": b'{"body": "x"}',
    "wrong type": b'{"text": 7}',
    "empty text": b'{"text": " \\n "}',
    "NUL bytes": b'{"text": "a\\u0000b"}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "not a JSON object": b"[1]",
    "blank line": b"  ",
}


def write_jsonl(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return path


def rejects(prefix):
    return [json.loads(line) for line in open(f"{prefix}.rejects.jsonl")]


def test_every_kind_is_counted_and_listed(tmp_path, vocabulary):
    lines = []
    for bad in BAD_LINES.values():
        lines += [GOOD, bad]
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b"\n".join(
            [
                *lines,
                b'{"text": "' + b"[" * 100 + b'"}',
                b"[" * 100000,
                b'{"text": 1' + b"0" * 5000 + b"}",
            ]
        )
    )
    assert preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "1") == 0
    manifest = check_corpus(tmp_path / "c")
    assert manifest.documents == len(BAD_LINES) + 1
    assert manifest.rejected["reasons"] == {**dict.fromkeys(BAD_LINES, 1), "broken JSON": 3}
    listed = rejects(tmp_path / "c")
    expected = [(2 * number + 2, reason) for number, reason in enumerate(BAD_LINES)]
    assert [(entry["line"], entry["reason"]) for entry in listed[: len(BAD_LINES)]] == expected
    assert {entry["file"] for entry in listed} == {str(path)}


def test_the_limit(tmp_path, vocabulary, capsys):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 9 + [BAD_LINES["broken JSON"]]))
    assert preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "0.09") == 3
    message = capsys.readouterr().err
    assert "1 of 10 records" in message
    assert "1 broken JSON" in message
    assert "--max-bad-fraction" in message
    assert not (tmp_path / "c.bin").exists()
    assert not (tmp_path / "c.manifest.json").exists()
    assert (
        preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "0.1") == 0
    )  # continues, does not begin anew
    assert CorpusManifest.read(tmp_path / "c").documents == 9


def test_line_numbers_run_through_all_blocks(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr("data_tools.reading.inputs.plan_units.__defaults__", (64,))
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 50 + [b"x"] + [GOOD] * 50 + [b"y"]))
    assert preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "1") == 0
    assert [entry["line"] for entry in rejects(tmp_path / "c")] == [51, 102]
    assert (
        preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "1", "--shard", "1/2")
        == 0
    )
    (entry,) = rejects(
        tmp_path / "c.shard-00001-of-00002"
    )  # a shard that begins inside a file says where it began to count
    assert path.read_bytes()[entry["counted_from"] :].split(b"\n")[entry["line"]] == b"y"


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("keep", [0.3, 0.9, -1])
def test_truncated_compressed_file(tmp_path, vocabulary, suffix, pack, keep, capsys):
    texts = [f"document {n} {os.urandom(20).hex()}" for n in range(8000)]
    content = pack(write_jsonl(tmp_path / "plain", texts).read_bytes())
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes(content[: int(len(content) * keep) if keep > 0 else -1])
    assert preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "0.0001") == 3
    assert "damaged or unreadable file" in capsys.readouterr().err
    assert preprocess([path], vocabulary, tmp_path / "c", "--max-bad-fraction", "1") == 0
    assert any("truncated" in entry["detail"] for entry in rejects(tmp_path / "c"))
    documents = CorpusManifest.read(tmp_path / "c").documents
    assert 8000 * (abs(keep) - 0.4) <= documents <= 8000
    assert documents < 8000 or keep == -1  # what lies before the damage is kept


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet", "c.txt.gz", "c.txt"])
def test_not_what_the_name_says(tmp_path, vocabulary, name):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe this is something else \x00\x01" * 50)
    write_jsonl(tmp_path / "good.jsonl", ["good"] * 3)
    assert preprocess([tmp_path / "good.jsonl", path], vocabulary, tmp_path / "c") == 3
    assert (
        preprocess(
            [tmp_path / "good.jsonl", path], vocabulary, tmp_path / "c", "--max-bad-fraction", "1"
        )
        == 0
    )
    assert CorpusManifest.read(tmp_path / "c").documents == 3
    assert [entry["file"] for entry in rejects(tmp_path / "c")] == [str(path)]


def test_parquet_rows(tmp_path, vocabulary):
    column = pyarrow.array([b"fine", b"\xff\xfe", b"also fine"], pyarrow.binary()).view(
        pyarrow.string()
    )
    table = pyarrow.table(
        {
            "text": pyarrow.concat_arrays(
                [column, pyarrow.array([None, "", "last"], pyarrow.string())]
            )
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    assert (
        preprocess([tmp_path / "c.parquet"], vocabulary, tmp_path / "c", "--max-bad-fraction", "1")
        == 0
    )
    assert CorpusManifest.read(tmp_path / "c").documents == 3
    assert [(entry["line"], entry["reason"]) for entry in rejects(tmp_path / "c")] == [
        (2, "invalid UTF-8"),
        (4, "wrong type"),
        (5, "empty text"),
    ]
    assert (
        preprocess([tmp_path / "c.parquet"], vocabulary, tmp_path / "d", "--text-key", "body") == 3
    )


def test_text_files(tmp_path, vocabulary):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.py").write_text("good = 1\n")
    (folder / "b.py").write_bytes("bäd".encode("latin-1"))
    (folder / "c.py").write_bytes(b"")
    (folder / "d.py").write_bytes(b" \n")
    (folder / "e.bin").write_bytes(b"a\0b")
    (folder / "f.py").symlink_to(folder / "nowhere")
    (folder / "g.py").write_bytes(b"\xef\xbb\xbfgood = 2\n")
    assert preprocess([folder], vocabulary, tmp_path / "c") == 3
    assert preprocess([folder], vocabulary, tmp_path / "c", "--max-bad-fraction", "0.5") == 0
    manifest = CorpusManifest.read(tmp_path / "c")
    assert manifest.documents == 2
    assert manifest.rejected["reasons"] == {
        "invalid UTF-8": 1,
        "empty file": 2,
        "NUL bytes": 1,
        "damaged or unreadable file": 1,
    }


def test_empty_files_of_a_folder_are_no_damage(tmp_path, vocabulary):
    (tmp_path / "d").mkdir()
    for number in range(9):
        (tmp_path / "d" / f"{number}.py").write_bytes(b"")
    (tmp_path / "d" / "x.py").write_text("x = 1\n")
    assert preprocess([tmp_path / "d"], vocabulary, tmp_path / "c", "--max-bad-fraction", "0") == 0
    assert CorpusManifest.read(tmp_path / "c").rejected["reasons"] == {"empty file": 9}


def test_nothing_left_is_an_error(tmp_path, vocabulary, capsys):
    (tmp_path / "c.jsonl").write_bytes(b"")
    assert preprocess([tmp_path / "c.jsonl"], vocabulary, tmp_path / "c") == 3
    assert "no records" in capsys.readouterr().err


def test_wrong_key_stops_early(tmp_path, vocabulary, capsys, monkeypatch):
    monkeypatch.setattr("data_tools.preprocessing._HOPELESS_RECORDS", 20)
    write_jsonl(tmp_path / "c.jsonl", ["x"] * 30)
    assert preprocess([tmp_path / "c.jsonl"], vocabulary, tmp_path / "c", "--text-key", "body") == 3
    assert "--text-key" in capsys.readouterr().err


def test_full_disk_is_a_sentence_and_can_be_continued(tmp_path, vocabulary, capsys, monkeypatch):
    from data_tools.writing.writer import CorpusWriter

    write_jsonl(tmp_path / "c.jsonl", ["some text"] * 30)
    with monkeypatch.context() as patch:

        def full(self, tokens):
            raise OSError(28, "No space left on device", "tokens.bin")

        patch.setattr(CorpusWriter, "append", full)
        assert preprocess([tmp_path / "c.jsonl"], vocabulary, tmp_path / "c") == 4
    assert "No space left" in capsys.readouterr().err
    assert preprocess([tmp_path / "c.jsonl"], vocabulary, tmp_path / "c") == 0
    assert CorpusManifest.read(tmp_path / "c").documents == 30


def test_filters_are_counted(tmp_path, vocabulary):
    write_jsonl(
        tmp_path / "c.jsonl",
        [
            "short",
            "a text of fair length",
            "a text of fair length",
            "x" * 100,
            "please no spam here",
            "another text of length",
        ],
    )
    (tmp_path / "keep.py").write_text(
        "def keep(text, record):\n    return 'spam' not in text\n\ndef broken(text, record):\n"
        "    return record['absent']\n"
    )
    assert (
        preprocess(
            [tmp_path / "c.jsonl"],
            vocabulary,
            tmp_path / "c",
            "--min-characters",
            "6",
            "--max-characters",
            "50",
            "--drop-duplicates",
            "--keep-if",
            tmp_path / "keep.py:keep",
        )
        == 0
    )
    manifest = CorpusManifest.read(tmp_path / "c")
    assert manifest.documents == 2
    assert manifest.filters == {
        "shorter than --min-characters": 1,
        "longer than --max-characters": 1,
        "exact duplicate": 1,
        "refused by --keep-if": 1,
    }
    assert manifest.sources[0]["text_bytes"] == len("a text of fair length") + len(
        "another text of length"
    )
    assert (
        preprocess(
            [tmp_path / "c.jsonl"],
            vocabulary,
            tmp_path / "d",
            "--keep-if",
            tmp_path / "keep.py:broken",
        )
        == 3
    )
