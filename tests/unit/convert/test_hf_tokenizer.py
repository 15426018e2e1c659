"""A SentencePiece vocabulary as tokenizer.json: the same ids as SentencePiece, also through
AutoTokenizer.
"""

import io
import random

import pytest
import sentencepiece

from megatron_slm.convert.hf_tokenizer import (
    AWKWARD_TEXTS,
    check_same_ids,
    from_sentencepiece,
    other_splits,
    write_tokenizer,
)
from megatron_slm.tokenization import load_tokenizer

WORDS = (
    "the quick brown fox jumps over a lazy dog def return self value 12 345 naïve — x = y + 1"
).split()
SETTINGS = {
    "bpe, SentencePiece's defaults": {"model_type": "bpe"},
    "bpe, every byte kept": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "bpe, runs of spaces": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "user_defined_symbols": ["\n"],
        "add_dummy_prefix": False,
    },
    "unigram": {"model_type": "unigram"},
    "bpe, no byte fallback": {"model_type": "bpe", "byte_fallback": False},
}


def train(path, **settings):
    draw = random.Random(1)
    lines = ["  " * draw.randrange(3) + " ".join(draw.choices(WORDS, k=12)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **({"vocab_size": 420, "byte_fallback": True} | settings),
    )
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_ids_as_sentencepiece_on_awkward_and_random_text(tmp_path, name):
    tokenizer = train(tmp_path / "t.model", **SETTINGS[name])
    fast = from_sentencepiece(tokenizer)
    draw = random.Random(2)
    noise = tuple(
        "".join(draw.choices(" \n\ttheab=1_é日", k=draw.randrange(40))) for _ in range(300)
    )
    check_same_ids(fast, tokenizer, AWKWARD_TEXTS + noise)
    for text in noise:
        ids = tokenizer.encode(text)
        if (
            tokenizer.unk_id not in ids
        ):  # SentencePiece shows an unknown token as a question mark, Hugging Face not at all
            assert fast.decode(ids) == tokenizer.decode(ids)


def test_autotokenizer_opens_it_offline(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = train(tmp_path / "t.model", **SETTINGS["bpe, every byte kept"])
    folder = tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 128)
    peer = AutoTokenizer.from_pretrained(folder)
    for text in AWKWARD_TEXTS:
        assert peer(text)["input_ids"] == tokenizer.encode(text)
    assert (peer.bos_token_id, peer.eos_token_id, peer.unk_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.unk_id,
    )
    assert peer.model_max_length == 128
    again = load_tokenizer(folder / "tokenizer.json")
    assert (again.eod_id, again.vocabulary_size) == (tokenizer.eod_id, tokenizer.vocabulary_size)


def test_a_tokenizer_json_is_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_tokenizer(train(tmp_path / "t.model"), source, 128)
    folder = tmp_path / "export"
    folder.mkdir()
    write_tokenizer(load_tokenizer(source / "tokenizer.json"), folder, 128)
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer_config.json").read_text() == (
        source / "tokenizer_config.json"
    ).read_text()


def test_a_vocabulary_that_cannot_be_rewritten_exactly_is_refused(tmp_path):
    tokenizer = train(tmp_path / "t.model", model_type="bpe", treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match="--tokenizer none"):
        check_same_ids(from_sentencepiece(tokenizer), tokenizer)


def test_texts_that_are_split_otherwise_are_counted(tmp_path):
    """Ways to split a run of spaces have nearly equal scores in a unigram model, and the sums are
    rounded differently.
    """
    settings = SETTINGS["bpe, runs of spaces"]
    exact = train(tmp_path / "bpe.model", **settings)
    other, compared, _ = other_splits(from_sentencepiece(exact), exact)
    assert other == 0
    assert compared > 5000
    near = train(tmp_path / "unigram.model", **settings | {"model_type": "unigram"})
    other, _, first = other_splits(from_sentencepiece(near), near)
    assert 0 < other < compared
    assert all("  " in text for text in first)
