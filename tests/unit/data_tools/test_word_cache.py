"""The word cache gives the tokenizer's own ids on every text.

It is not used where that is not proved.
"""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoding import segment_table, word_cache
from data_tools.encoding.encoders import PlainEncoder, build_encoder
from data_tools.encoding.segments import (
    BEYOND_ASCII,
    LETTER,
    NEWLINE,
    OTHER_ASCII,
    SPACE,
    cut_rules,
)
from data_tools.encoding.word_cache import CachedEncoder
from megatron_slm.tokenization import load_tokenizer

ALPHABET = " \n\t_-=.'\"()ab zAB019éüñ日本語한🙂\u0301\u200d\u2581\u00a0<s>/"
BASE = dict(
    model_type="bpe",
    vocab_size=560,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    num_threads=1,
    minloglevel=2,
    split_digits=True,
    character_coverage=0.999,
)
_WORDS = ["".join(random.Random(n).choices("abdeimnorstuy", k=2 + n % 7)) for n in range(300)]
SENTENCES = [
    f"def {_WORDS[n % 300]}_{n}(self, {_WORDS[n * 7 % 300]}={n}):    "
    f"return café_{_WORDS[n * 11 % 300]} + 日本 + "
    f"'it''s {_WORDS[n * 13 % 300]}' ** {n * 7919 % 1000}  # nö comment"
    for n in range(500)
]


def model(tmp_path, **options):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=content, **{**BASE, **options}
    )
    path = tmp_path / "m.model"
    path.write_bytes(content.getvalue())
    return load_tokenizer(path)


def assert_equal(tokenizer, texts):
    cached = build_encoder(tokenizer)
    assert isinstance(cached, CachedEncoder)
    assert cached.encode_batch(texts) == PlainEncoder(tokenizer).encode_batch(texts)
    assert cached.encode_batch(texts) == PlainEncoder(tokenizer).encode_batch(
        texts
    )  # now from the cache


@pytest.fixture(scope="module")
def encoders(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    return build_encoder(tokenizer), PlainEncoder(tokenizer)


VARIANTS = [
    {},
    {"add_dummy_prefix": False},
    {"split_by_unicode_script": False, "split_by_number": False, "split_digits": False},
    {"split_by_whitespace": False},
    {"user_defined_symbols": ["<|sep|>", "f_"]},
    {"vocab_size": 420},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_tokenizer_on_random_text(tmp_path, options):
    tokenizer = model(tmp_path, **options)
    generator = random.Random(5)
    texts = [
        "".join(generator.choices(ALPHABET, k=generator.randrange(1, 200))) for _ in range(400)
    ]
    texts += [sentence * 3 for sentence in SENTENCES[:40]] + [
        "x <|sep|> f_1",
        "a" * 5000,
        "=" * 100,
        " " * 70 + "x",
        "é" * 40,
    ]
    assert_equal(tokenizer, texts)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(
            alphabet=st.one_of(
                st.sampled_from(ALPHABET),
                st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
            )
        ),
        max_size=5,
    )
)
def test_equals_the_tokenizer_on_any_text(encoders, texts):
    cached, plain = encoders
    texts = [text for text in texts if text]
    assert cached.encode_batch(texts) == plain.encode_batch(texts)


def test_whitespace_pieces_across_words_take_cuts_away(tmp_path):
    assert cut_rules(model(tmp_path)).may_cut[LETTER, SPACE]
    joined = model(tmp_path, split_by_whitespace=False)
    assert not cut_rules(joined).may_cut[LETTER, SPACE]


def test_characters_of_several_bytes_are_never_cut(vocabulary):
    rules = cut_rules(load_tokenizer(vocabulary))
    assert not rules.may_cut[BEYOND_ASCII, BEYOND_ASCII]
    assert rules.may_cut[NEWLINE].all()
    assert rules.may_cut[LETTER, OTHER_ASCII]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"normalization_rule_name": "nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
    ],
)
def test_not_proved_means_plain(tmp_path, options):
    tokenizer = model(tmp_path, **options)
    assert cut_rules(tokenizer) is None
    assert isinstance(build_encoder(tokenizer), PlainEncoder)


def test_plain_on_request(vocabulary):
    assert isinstance(build_encoder(load_tokenizer(vocabulary), "plain"), PlainEncoder)


def test_a_full_table_starts_again(vocabulary, monkeypatch):
    tokenizer = load_tokenizer(vocabulary)
    monkeypatch.setattr(word_cache, "MOST_ENTRIES", 60)
    monkeypatch.setattr(word_cache, "_MOST_LONG_ENTRIES", 2)
    encoder = build_encoder(tokenizer)
    generator = random.Random(6)
    for _ in range(60):
        text = " ".join(
            "".join(generator.choices("abcdefgh", k=generator.choice([3, 9, 40])))
            for _ in range(15)
        )
        assert encoder.encode_batch([text]) == PlainEncoder(tokenizer).encode_batch([text])
        assert encoder._short.entries <= 60
        assert len(encoder._long) <= 2


def test_colliding_slots(vocabulary, monkeypatch):
    """Every key hashes to one of four slots: probing, not luck, must tell them apart."""
    monkeypatch.setattr(segment_table, "_SLOT_BITS", 10)
    monkeypatch.setattr(word_cache, "MOST_ENTRIES", 600)
    monkeypatch.setattr(
        segment_table.SegmentTable,
        "_hash",
        staticmethod(lambda keys: (keys[:, 0] & np.uint64(3)).astype(np.int64)),
    )
    tokenizer = load_tokenizer(vocabulary)
    words = [f"word{n}x another_long_identifier_{n}" for n in range(160)]
    texts = [" ".join(words[start : start + 40]) for start in range(0, 160, 40)]
    assert_equal(tokenizer, texts)


def test_long_texts_are_cut_into_parts(vocabulary, monkeypatch):
    monkeypatch.setattr(word_cache, "_BATCH_BYTES", 64)
    tokenizer = load_tokenizer(vocabulary)
    encoder = build_encoder(tokenizer)
    texts = ["one line only " * 50, "many\nlines é\n\n" * 50, "a" * 1000, "日本語" * 100, "x"]
    assert encoder.encode_batch(texts) == PlainEncoder(tokenizer).encode_batch(texts)
    assert max(map(len, encoder.parts_of(b" " + texts[1].encode()))) <= 64
    assert b"".join(encoder.parts_of(texts[3].encode())) == texts[3].encode()


def test_wide_vocabularies_are_int32(vocabulary, monkeypatch):
    monkeypatch.setattr("megatron_slm.tokenization.tokenizer.UINT16_VOCABULARY_LIMIT", 10)
    tokenizer = load_tokenizer(vocabulary)
    encoded = build_encoder(tokenizer).encode_batch(["some words"])[0]
    assert np.frombuffer(encoded, "<i4").tolist() == tokenizer.encode("some words")
