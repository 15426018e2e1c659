"""inspect_corpus shows what is in a corpus and says what it cannot show."""

from __future__ import annotations

import json
import os

import pytest

from data_tools.inspect_corpus import main


def test_numbers_and_histogram(prefix, capsys):
    assert main([str(prefix)]) == 0
    out = capsys.readouterr().out
    assert "240 documents" in out
    assert "█" in out
    assert main([str(prefix), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    numbers = shown["statistics"]["total"]
    assert numbers["documents"] == 240
    assert sum(numbers["document_tokens"]["histogram_log2"]) == 240
    assert numbers["bytes_per_token"] == pytest.approx(numbers["text_bytes"] / numbers["tokens"])
    quantiles = list(numbers["document_tokens"]["quantiles"].values())
    assert quantiles == sorted(quantiles)
    assert quantiles[0] > 0


def test_without_statistics_the_index_is_enough(prefix, capsys):
    os.unlink(f"{prefix}.statistics.json")
    assert main([str(prefix), "--json"]) == 0
    assert (
        sum(
            json.loads(capsys.readouterr().out)["statistics"]["total"]["document_tokens"][
                "histogram_log2"
            ]
        )
        == 240
    )


def test_documents_and_tokens(prefix, capsys):
    assert main([str(prefix), "--document", "1", "-1"]) == 0
    out = capsys.readouterr().out
    assert "quick brown fox" in out
    assert "document 239" in out
    assert "are only text here 39" in out
    assert main([str(prefix), "--document", "1", "--tokens", "--max-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 5
    assert "more tokens" in out


def test_picture(prefix, tmp_path):
    assert main([str(prefix), "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_sentences(prefix, capsys):
    for more, word in (
        (["--document", "240"], "0 to 239"),
        (["--tokens"], "--document"),
        (["--max-tokens", "0"], "--max-tokens"),
    ):
        assert main([str(prefix), *more]) == 3
        assert word in capsys.readouterr().err
    assert main([f"{prefix}-none"]) == 3
