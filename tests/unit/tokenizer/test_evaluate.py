"""The numbers of tokenizer.evaluate, against counting by hand."""

from __future__ import annotations

import json

import pytest

from megatron_slm.tokenization import load_tokenizer
from tokenizer.evaluate import main
from tokenizer.train import main as train


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"some words number {n} and value_{n} = {n * n}"}) + "\n"
            for n in range(300)
        )
    )
    (tmp_path / "other.txt").write_text("日本 ab")
    for name, more in (("a", []), ("b", ["--no-byte-fallback"])):
        size = "300" if name == "a" else "40"
        assert (
            train(
                [
                    "--input",
                    str(path),
                    "--output-prefix",
                    str(tmp_path / name),
                    "--vocab-size",
                    size,
                    "--threads",
                    "1",
                    *more,
                ]
            )
            == 0
        )
    return tmp_path


def test_numbers(files):
    assert (
        main(
            [
                "--tokenizer",
                str(files / "a.model"),
                "--against",
                str(files / "b.model"),
                "--input",
                str(files / "c.jsonl"),
                str(files / "other.txt"),
                "--json",
                str(files / "r.json"),
                "--picture",
                str(files / "r.png"),
            ]
        )
        == 0
    )
    sources = json.loads((files / "r.json").read_text())["sources"]
    with_bytes, without = (
        sources[str(files / "other.txt")][str(files / f"{name}.model")] for name in "ab"
    )
    ids = load_tokenizer(files / "a.model").encode("日本 ab")
    assert with_bytes["tokens"] == len(ids)
    assert with_bytes["text_bytes"] == 9
    assert with_bytes["words"] == 2
    assert with_bytes["byte_token_fraction"] == pytest.approx(6 / len(ids))
    assert with_bytes["round_trip_failures"] == 0
    assert without["unknown_fraction"] > 0
    assert without["byte_token_fraction"] == 0
    assert without["round_trip_failures"] == 1
    text = sources[str(files / "c.jsonl")][str(files / "a.model")]
    assert text["documents"] == 300
    assert text["unknown_fraction"] == 0
    assert text["bytes_per_token"] > 1.2
    assert (files / "r.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_sentences(files, capsys):
    assert main(["--tokenizer", str(files / "none.model"), "--input", str(files / "c.jsonl")]) == 3
    assert (
        main(
            [
                "--tokenizer",
                str(files / "a.model"),
                "--input",
                str(files / "c.jsonl"),
                "--text-key",
                "body",
            ]
        )
        == 3
    )
    assert "missing key" in capsys.readouterr().err
