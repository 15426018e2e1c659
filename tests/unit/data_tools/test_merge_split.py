"""Shards joined are the whole; a split loses nothing and puts equal documents on one side."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_tools import merge as merge_program
from data_tools import split as split_program
from data_tools.preprocess import main
from data_tools.writing.run_identity import shard_prefix
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.testing.corpora import write_corpus, write_scores


def documents(prefix):
    index = read_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    return [tokens[start:end].tobytes() for start, end in pairwise(index.document_starts_tokens())]


@pytest.fixture
def corpus(tmp_path, vocabulary, monkeypatch):
    """(prefix of the whole, command to make it or a shard)."""
    monkeypatch.setattr("data_tools.reading.inputs.plan_units.__defaults__", (2000,))
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"document {n % 400} with words " * (1 + n % 5)}) + "\n"
            for n in range(500)
        )
    )
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(f"text {number}")
    arguments = [
        "--input",
        str(path),
        str(tmp_path / "texts"),
        "--tokenizer",
        str(vocabulary),
        "--workers",
        "1",
    ]
    assert main([*arguments, "--output-prefix", str(tmp_path / "whole")]) == 0
    return tmp_path / "whole", arguments


@pytest.mark.parametrize("count", [1, 4, 60])
def test_shards_joined_are_the_whole(tmp_path, corpus, count):
    whole, arguments = corpus
    for index in reversed(range(count)):
        assert (
            main(
                [*arguments, "--output-prefix", str(tmp_path / "c"), "--shard", f"{index}/{count}"]
            )
            == 0
        )
    assert (
        merge_program.main(
            [
                "--input",
                f"{tmp_path}/c.shard-*-of-{count:05d}",
                "--output-prefix",
                str(tmp_path / "joined"),
            ]
        )
        == 0
    )
    for suffix in (".bin", ".idx"):
        assert (
            Path(f"{tmp_path}/joined{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()
        )
    assert json.loads(Path(f"{tmp_path}/joined.statistics.json").read_text()) == json.loads(
        Path(f"{whole}.statistics.json").read_text()
    )
    ours = check_corpus(tmp_path / "joined").sources
    theirs = CorpusManifest.read(whole).sources
    for name in ("records", "documents", "tokens", "text_bytes"):
        for our_source, their_source in zip(ours, theirs, strict=True):
            assert our_source[name] == their_source[name]


def test_a_second_merge_of_the_same_parts_does_nothing(tmp_path, corpus, capsys):
    write_corpus(tmp_path / "a", [[5, 6, 2]], eod_id=2)
    write_corpus(tmp_path / "b", [[7, 2]], eod_id=2)

    def merge(*names: str) -> int:
        inputs = [str(tmp_path / name) for name in names]
        return merge_program.main(["--input", *inputs, "--output-prefix", str(tmp_path / "j")])

    assert merge("a", "b") == 0
    stamp = Path(f"{tmp_path}/j.bin").stat().st_mtime_ns
    assert merge("a", "b") == 0
    assert "done before, from the same parts" in capsys.readouterr().out
    assert Path(f"{tmp_path}/j.bin").stat().st_mtime_ns == stamp
    assert merge("b", "a") == 3
    assert "made from other inputs or options" in capsys.readouterr().err
    Path(f"{tmp_path}/j.bin").write_bytes(bytes(10))
    assert merge("a", "b") == 3  # not what was made


def test_missing_damaged_or_foreign_parts(tmp_path, corpus, capsys):
    whole, arguments = corpus
    prefixes = [shard_prefix(str(tmp_path / "c"), index, 3) for index in range(3)]
    for index in range(3):
        assert (
            main([*arguments, "--output-prefix", str(tmp_path / "c"), "--shard", f"{index}/3"]) == 0
        )

    def refused(*inputs, word):
        assert (
            merge_program.main(
                ["--input", *map(str, inputs), "--output-prefix", str(tmp_path / "joined")]
            )
            == 3
        )
        assert word in capsys.readouterr().err
        assert not list(tmp_path.glob("joined*"))

    refused(*prefixes[:2], word="missing")
    refused(*prefixes, whole, word="whole corpus")
    refused(prefixes[0], prefixes[0], word="twice")
    refused(tmp_path / "none*", word="no corpus matches")
    assert main([*arguments, "--no-append-eod", "--output-prefix", str(tmp_path / "other")]) == 0
    refused(whole, tmp_path / "other", word="append_eod")
    content = bytearray(Path(f"{prefixes[1]}.bin").read_bytes())
    content[10] ^= 1
    Path(f"{prefixes[1]}.bin").write_bytes(content)
    refused(*prefixes, word="changed")
    Path(f"{prefixes[1]}.bin").write_bytes(content[:-2])
    refused(*prefixes, word="truncated")


def test_whole_corpora_are_joined_in_the_order_given(tmp_path, corpus):
    whole, arguments = corpus
    assert (
        main([*arguments[:1], *arguments[2:], "--output-prefix", str(tmp_path / "texts_only")]) == 0
    )
    assert (
        merge_program.main(
            [
                "--input",
                str(tmp_path / "texts_only"),
                str(whole),
                "--output-prefix",
                str(tmp_path / "j"),
            ]
        )
        == 0
    )
    assert documents(tmp_path / "j") == documents(tmp_path / "texts_only") + documents(whole)
    first, second, joined = (
        json.loads(Path(f"{prefix}.statistics.json").read_text())
        for prefix in (tmp_path / "texts_only", whole, tmp_path / "j")
    )
    assert joined["sources"] == first["sources"] + second["sources"]
    assert joined["total"]["document_tokens"]["quantiles"]["1"] == max(
        len(tokens) // 2 for tokens in documents(tmp_path / "j")
    )


def test_corpora_whose_documents_different_tokens_end_are_not_joined(tmp_path, capsys):
    """One tokenizer.json beside files that name different ends: the manifests tell them apart."""
    for name, eod_id in (("a", 2), ("b", 3)):
        write_corpus(tmp_path / name, [[5, 6, eod_id]], eod_id=eod_id)
    write_corpus(tmp_path / "of_an_earlier_version", [[7, 2]], eod_id=2)
    write_corpus(tmp_path / "now", [[8, 2]], eod_id=2, bos_id=1)
    with pytest.raises(ValueError, match="b and .*a cannot be joined.*eod_id 3 and 2"):
        merge_program.merge([f"{tmp_path}/a", f"{tmp_path}/b"], f"{tmp_path}/c")
    earlier = f"{tmp_path}/of_an_earlier_version"
    now = f"{tmp_path}/now"
    assert merge_program.merge([earlier, now], f"{tmp_path}/d").tokenizer["eod_id"] == 2


def test_split(tmp_path, corpus, capsys):
    whole, _ = corpus
    run = ["--held-out-fraction", "0.2", "--output-prefix", str(tmp_path / "s")]
    assert split_program.main([str(whole), *run]) == 0
    train = documents(tmp_path / "s_train")
    held_out = documents(tmp_path / "s_held_out")
    everything = documents(whole)
    assert sorted(train + held_out) == sorted(everything)
    assert not set(train) & set(held_out)  # copies of a document stay together
    assert [document for document in everything if document in set(held_out)] == held_out
    assert 0.1 < len(held_out) / len(everything) < 0.3
    check_corpus(tmp_path / "s_train")
    check_corpus(tmp_path / "s_held_out")
    before = Path(f"{tmp_path}/s_train.bin").read_bytes()
    stamp = Path(f"{tmp_path}/s_train.bin").stat().st_mtime_ns
    assert split_program.main([str(whole), *run]) == 0
    assert "done before, from the same corpus and options" in capsys.readouterr().out
    assert Path(f"{tmp_path}/s_train.bin").stat().st_mtime_ns == stamp
    assert split_program.main([str(whole), *run, "--seed", "3"]) == 3
    assert "seed: it has 0, this command has 3" in capsys.readouterr().err
    for suffix in (".bin", ".idx", ".manifest.json"):  # killed before the second part was published
        Path(f"{tmp_path}/s_held_out{suffix}").unlink()
    assert split_program.main([str(whole), *run]) == 0
    check_corpus(tmp_path / "s_held_out")
    assert split_program.main([str(whole), *run, "--overwrite"]) == 0
    assert Path(f"{tmp_path}/s_train.bin").read_bytes() == before
    assert split_program.main([str(whole), *run, "--overwrite", "--seed", "9"]) == 0
    assert Path(f"{tmp_path}/s_train.bin").read_bytes() != before


def test_what_a_killed_merge_left_is_in_nobodys_way(tmp_path, corpus):
    whole, _ = corpus
    (tmp_path / "copy.partial").mkdir()
    (tmp_path / "copy.partial" / "tokens.bin").write_bytes(b"left behind")
    merge = ["--input", str(whole), "--output-prefix", str(tmp_path / "copy")]
    assert merge_program.main(merge) == 0
    assert documents(tmp_path / "copy") == documents(whole)


def test_a_merge_neither_joins_nor_removes_an_unfinished_preprocess(tmp_path, corpus, capsys):
    whole, _ = corpus
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "progress.json").write_text("{}")
    merge = ["--input", str(whole), "--output-prefix", str(tmp_path / "c")]
    assert merge_program.main(merge) == 3
    assert "unfinished run of data_tools.preprocess" in capsys.readouterr().err
    assert (tmp_path / "c.partial" / "progress.json").exists()


def test_a_larger_share_contains_the_smaller():
    tokens = [np.arange(n, dtype=np.uint16).tobytes() for n in range(1, 500)]
    small = {t for t in tokens if split_program.is_held_out(t, 1, 0.1)}
    large = {t for t in tokens if split_program.is_held_out(t, 1, 0.3)}
    assert small < large


@pytest.mark.parametrize("fraction", ["0", "1", "-1", "nan", "0.000001"])
def test_split_that_makes_no_sense(tmp_path, corpus, fraction, capsys):
    whole, _ = corpus
    assert (
        split_program.main(
            [str(whole), "--held-out-fraction", fraction, "--output-prefix", str(tmp_path / "s")]
        )
        == 3
    )
    assert not list(tmp_path.glob("s_*"))


@pytest.mark.parametrize("shard_tokens", [1500, 10**6])
def test_scores_follow_their_documents(tmp_path, corpus, shard_tokens, monkeypatch):
    """The score of every token in a part is the score of that token in the whole corpus."""
    whole, _ = corpus
    store = write_scores(tmp_path / "scores", whole, columns=("loss", "entropy"))
    monkeypatch.setattr(
        "data_tools.writing.split_scores.default_shard_tokens", lambda tokens: shard_tokens
    )
    run = [
        "--held-out-fraction",
        "0.2",
        "--output-prefix",
        str(tmp_path / "s"),
        "--scores",
        str(tmp_path / "scores"),
    ]
    assert split_program.main([str(whole), *run]) == 0
    texts = documents(whole)
    values = store.read("loss", 0, store.manifest.corpus_tokens)
    starts = read_index(f"{whole}.idx").document_starts_tokens()
    for part in ("train", "held_out"):
        carried = ScoreStore.open(f"{tmp_path}/s_{part}.scores")
        carried.check_against(check_corpus(f"{tmp_path}/s_{part}"))
        assert carried.manifest.complete
        assert carried.columns == ("loss", "entropy")
        assert "scored in the whole corpus" in carried.manifest.reference_description
        kept = set(documents(tmp_path / f"s_{part}"))
        expected = np.concatenate(
            [
                values[start:end]
                for text, start, end in zip(texts, starts[:-1], starts[1:], strict=True)
                if text in kept
            ]
        )
        np.testing.assert_array_equal(
            carried.read("loss", 0, carried.manifest.corpus_tokens), expected
        )
        np.testing.assert_array_equal(
            carried.read("entropy", 0, carried.manifest.corpus_tokens), expected + 1
        )


def test_scores_of_another_corpus_or_a_folder_in_the_way_stop_a_split(tmp_path, corpus, capsys):
    whole, arguments = corpus
    assert main([*arguments, "--no-append-eod", "--output-prefix", str(tmp_path / "other")]) == 0
    write_scores(tmp_path / "others", tmp_path / "other")
    write_scores(tmp_path / "scores", whole)
    run = [
        str(whole),
        "--held-out-fraction",
        "0.2",
        "--output-prefix",
        str(tmp_path / "s"),
        "--scores",
    ]
    assert split_program.main([*run, str(tmp_path / "others")]) == 3
    assert "of another corpus" in capsys.readouterr().err
    (tmp_path / "s_held_out.scores").mkdir()
    assert split_program.main([*run, str(tmp_path / "scores")]) == 3
    assert "exists already" in capsys.readouterr().err
    assert not list(tmp_path.glob("s_*.bin"))
