"""data_tools.verify --scores and data_tools.inspect_corpus --scores."""

import numpy as np
import pytest
from rich.console import Console

from data_tools import verify
from data_tools.stored_scores import show_scored_text, show_scored_tokens
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.corpus import TokenStream
from megatron_slm.testing.corpora import (
    random_documents,
    score_manifest,
    write_corpus,
    write_scores,
)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(
        tmp_path / "c", random_documents(9, 15, vocabulary_size=50, seed=3), vocabulary_size=50
    )


def test_a_sound_store_is_accepted(tmp_path, corpus, capsys):
    write_scores(tmp_path / "s", tmp_path / "c")
    assert verify.main([str(tmp_path / "c"), "--scores", str(tmp_path / "s")]) == 0
    assert "s: sound" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (
            lambda folder: (folder / "s" / "loss.bin").write_bytes(
                b"x" * (folder / "s" / "loss.bin").stat().st_size
            ),
            "are not the bytes that were written",
        ),
        (lambda folder: (folder / "s" / "shards" / "shard_000000.json").unlink(), "incomplete"),
        (
            lambda folder: write_corpus(
                folder / "c",
                random_documents(9, 15, vocabulary_size=50, seed=4),
                vocabulary_size=50,
            ),
            "of another corpus",
        ),
    ],
)
def test_an_unsound_store_is_a_sentence(tmp_path, corpus, capsys, damage, sentence):
    write_scores(tmp_path / "s", tmp_path / "c")
    damage(tmp_path)
    assert verify.main([str(tmp_path / "c"), "--scores", str(tmp_path / "s")]) == 3
    assert sentence in capsys.readouterr().err


def test_tokens_without_a_score_are_counted(tmp_path, corpus, capsys):
    store = ScoreStore.create(tmp_path / "s", score_manifest(corpus, shard_tokens=1000))
    values = np.zeros(corpus.tokens)
    values[1:4] = np.nan  # the first document is longer than that
    store.write_shard(0, {"loss": values})
    store.finish()
    assert verify.main([str(tmp_path / "c"), "--scores", str(tmp_path / "s")]) == 0
    assert "3 tokens besides the first" in " ".join(capsys.readouterr().out.split())


class Words:
    """A tokenizer whose pieces are words."""

    eod_id = 0

    def piece(self, token_id: int) -> str:
        return f" w{token_id}"


def test_text_is_shown_with_the_score_of_each_token(tmp_path, corpus, capsys):
    store = write_scores(tmp_path / "s", tmp_path / "c", lambda offsets: offsets / 8)
    ids = TokenStream(str(tmp_path / "c")).tokens[:6]
    show_scored_text(store, 0, ids, Words(), Console(width=200))
    shown = capsys.readouterr().out
    assert shown.startswith(f" w{ids[0]}[–] w{ids[1]}[0.125] w{ids[2]}[0.250]")
    assert "mean loss 0.375 nats over 5 tokens" in shown
    show_scored_tokens(store, 0, ids, Words(), Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["2", str(ids[2]), "0.250", "'", f"w{ids[2]}'"]
    assert len(lines) == 7


def test_inspect_corpus_shows_a_document_with_its_scores(tmp_path, corpus, capsys, monkeypatch):
    from data_tools import inspect_corpus

    write_scores(tmp_path / "s", tmp_path / "c", lambda offsets: offsets / 8)
    monkeypatch.setattr(inspect_corpus, "find_tokenizer", lambda *_: Words())
    starts = TokenStream(str(tmp_path / "c")).document_starts
    assert (
        inspect_corpus.main(
            [str(tmp_path / "c"), "--scores", str(tmp_path / "s"), "--document", "7"]
        )
        == 0
    )
    assert f"[{(starts[7] + 1) / 8:.3f}]" in capsys.readouterr().out
    assert inspect_corpus.main([str(tmp_path / "c"), "--scores", str(tmp_path / "s")]) == 3
    assert "--document" in capsys.readouterr().err
    write_corpus(
        tmp_path / "other", random_documents(9, 15, vocabulary_size=50, seed=8), vocabulary_size=50
    )
    assert (
        inspect_corpus.main(
            [str(tmp_path / "other"), "--scores", str(tmp_path / "s"), "--document", "0"]
        )
        == 3
    )
    assert "of another corpus" in capsys.readouterr().err
