"""Training is reproducible, loses no text, and explains what it cannot do."""

from __future__ import annotations

import json
import random

import pytest

from megatron_slm.tokenization import load_tokenizer
from tokenizer.round_trip import AWKWARD_TEXTS, round_trip_failures
from tokenizer.sample import sentences
from tokenizer.train import main

WORDS = ["".join(random.Random(n).choices("abdeimnorstuy", k=3 + n % 6)) for n in range(300)]
LINES = [
    f"def {WORDS[n]}_{n}({WORDS[n * 7 % 300]}):\n"
    f"    return {WORDS[n * 11 % 300]} * {n}  # {WORDS[n * 13 % 300]}\n"
    for n in range(300)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def train(corpus, prefix, *more, size=500):
    return main(
        [
            "--input",
            str(corpus),
            "--output-prefix",
            str(prefix),
            "--vocab-size",
            str(size),
            "--threads",
            "1",
            *map(str, more),
        ]
    )


@pytest.mark.parametrize("model_type, size", [("bpe", 500), ("unigram", 400)])
def test_round_trip_and_special_ids(tmp_path, corpus, model_type, size):
    assert train(corpus, tmp_path / "v", "--model-type", model_type, size=size) == 0
    tokenizer = load_tokenizer(tmp_path / "v.model")
    assert tokenizer.vocabulary_size == size
    assert round_trip_failures(tokenizer, AWKWARD_TEXTS + tuple(LINES[:20])) == []
    assert (
        tokenizer.unk_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.eod_id,
    ) == (0, 1, 2, 3, 2)
    assert all(len(tokenizer.encode(digits)) >= len(digits) for digits in ("1234", "99"))
    assert not {0, 1, 2, 3} & set(tokenizer.encode("<s> </s> <unk> <pad>"))
    manifest = json.loads((tmp_path / "v.manifest.json").read_text())
    assert manifest["fingerprint"] == tokenizer.fingerprint
    assert manifest["sample"]["documents"] == len(LINES)


def test_same_inputs_same_file_and_seed_matters(tmp_path, corpus):
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", 2))):
        assert train(corpus, tmp_path / name, "--sample-bytes", 12_000, *more) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert (tmp_path / "a.model").read_bytes() != (tmp_path / "c.model").read_bytes()
    sample = json.loads((tmp_path / "a.manifest.json").read_text())["sample"]
    assert 0.3 * 12_000 < sample["bytes"] < 2 * 12_000
    assert sample["documents_seen"] == len(LINES)


def test_folder_of_text_gives_the_same_as_jsonl(tmp_path, corpus):
    (tmp_path / "d").mkdir()
    for number, line in enumerate(LINES):
        (tmp_path / "d" / f"{number:04}.py").write_text(line)
    assert train(corpus, tmp_path / "a") == 0
    assert train(tmp_path / "d", tmp_path / "b") == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_special_tokens_never_come_out_of_text(tmp_path, corpus):
    assert train(corpus, tmp_path / "v", "--special-token", "<|user|>", "<|end|>") == 0
    tokenizer = load_tokenizer(tmp_path / "v.model")
    special = tokenizer.backend.piece_to_id("<|user|>")
    assert special > 3
    assert special not in tokenizer.encode("a <|user|> b")
    assert tokenizer.decode(tokenizer.encode("a <|user|> b")) == "a <|user|> b"


def test_normalisation_is_a_choice(tmp_path, corpus):
    assert train(corpus, tmp_path / "v", "--normalization", "nfkc") == 0
    tokenizer = load_tokenizer(tmp_path / "v.model")
    assert tokenizer.decode(tokenizer.encode("ﬁ")) == "fi"


def test_refuses_to_overwrite(tmp_path, corpus, capsys):
    assert train(corpus, tmp_path / "v") == 0
    assert train(corpus, tmp_path / "v", size=450) == 2
    refused = capsys.readouterr().err
    assert "vocab_size: it has 500, this command has 450" in refused
    assert "--overwrite" in refused
    assert load_tokenizer(tmp_path / "v.model").vocabulary_size == 500
    assert train(corpus, tmp_path / "v", "--overwrite", size=450) == 0


def test_a_second_run_of_the_same_command_does_nothing(tmp_path, corpus, capsys):
    assert train(corpus, tmp_path / "v") == 0
    stamp = (tmp_path / "v.model").stat().st_mtime_ns
    assert train(corpus, tmp_path / "v") == 0
    assert "done before, from the same inputs and options" in capsys.readouterr().out
    assert (tmp_path / "v.model").stat().st_mtime_ns == stamp
    corpus.write_bytes(corpus.read_bytes() * 2)
    assert train(corpus, tmp_path / "v") == 3
    assert "files: it has" in capsys.readouterr().err
    (tmp_path / "v.manifest.json").unlink()
    assert train(corpus, tmp_path / "v") == 2
    assert "nothing says what it was made from" in capsys.readouterr().err


def test_errors_are_sentences(tmp_path, corpus, capsys):
    assert (
        train(corpus, tmp_path / "v", "--sample-bytes", "-1", "--character-coverage", "7", size=10)
        == 2
    )
    message = capsys.readouterr().err
    assert "--vocab-size 10" in message
    assert "--sample-bytes -1" in message
    assert "--character-coverage 7" in message
    assert train(corpus, tmp_path / "v", size=50_000) == 3
    assert "too high" in capsys.readouterr().err
    assert train(corpus, tmp_path / "v", "--text-key", "body") == 3
    assert "missing key" in capsys.readouterr().err
    assert train(tmp_path / "none.jsonl", tmp_path / "v") == 3
    assert not list(tmp_path.glob("v*"))


def test_sentences_keep_every_character():
    text = "a line\n\n" + "word " * 3000 + "\n" + "x" * 5000 + "é" * 3000
    pieces = list(sentences(text))
    assert "".join(pieces) == text.replace("\n", "")
    assert max(len(piece.encode()) for piece in pieces) <= 4000
    assert all("\n" not in piece for piece in pieces)
