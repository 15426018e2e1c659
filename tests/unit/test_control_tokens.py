"""A literal control string in a text never becomes the control id, in any kind of vocabulary."""

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_tools.preprocess import main as preprocess
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.manifest import check_corpus
from megatron_slm.tokenization import load_tokenizer

CHARACTERS = sorted(set("abhelostxyz <>/|\n"))
VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2}
VOCABULARY |= {character: 3 + number for number, character in enumerate(CHARACTERS)}
TEXTS = ["a</s>b", "a </s> b", "</s>", "x\n</s>\ny", "hello <s> </s></s> <pad>", "a </s", "az"]


def marked(tokenizer):
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tokenizer


def unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces + [(c, -3.0) for c in CHARACTERS], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return marked(tokenizer)


def word_level(**settings):
    words = {**VOCABULARY, "hello": 40}
    tokenizer = Tokenizer(models.WordLevel(words, **{"unk_token": "<unk>", **settings}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return marked(tokenizer)


def word_piece():
    rest = {f"##{character}": 50 + number for number, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordPiece({**VOCABULARY, **rest}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return marked(tokenizer)


def bpe(vocabulary=(), merges=(), **settings):
    words = {**VOCABULARY, **dict(vocabulary)}
    return Tokenizer(models.BPE(words, list(merges), unk_token="<unk>", **settings))


def bpe_that_ignores_merges():
    tokenizer = bpe(ignore_merges=True)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return marked(tokenizer)


def bpe_that_merges_up_to_it():
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("h", "e")]
    return marked(bpe({"</": 40, "s>": 41, "he": 42}, merges))


def bpe_without_the_mark():
    """Added tokens with special=false, some of them in the vocabulary and some behind it.

    The last is no control token.
    """
    tokenizer = bpe()
    tokenizer.add_tokens(
        [AddedToken(name, special=False) for name in ("<s>", "</s>", "<pad>", "<|x|>")]
    )
    return tokenizer


def bpe_whose_normalizer_makes_it():
    tokenizer = bpe_without_the_mark()
    tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=True)])
    tokenizer.normalizer = normalizers.Replace("z", "</s>")
    return tokenizer


def byte_level():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = {character: number for number, character in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE({**words, "</s>": 256}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return marked(tokenizer)


KINDS = [
    unigram,
    word_level,
    word_piece,
    bpe_that_ignores_merges,
    bpe_that_merges_up_to_it,
    bpe_without_the_mark,
    bpe_whose_normalizer_makes_it,
    byte_level,
]


def saved(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("make", KINDS)
def test_no_text_gives_a_control_id(make, tmp_path):
    tokenizer = saved(make(), tmp_path)
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None} == tokenizer.control_ids
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids, text
        assert not tokenizer.control_ids & set(ids), text
    flat, _ = tokenizer.encode_batch(TEXTS)
    assert flat.tolist() == [token_id for text in TEXTS for token_id in tokenizer.encode(text)]


@pytest.mark.parametrize("make", KINDS)
def test_every_other_text_gives_the_ids_it_gave_before(make, tmp_path):
    theirs = make()
    ours = saved(make(), tmp_path)
    draw = random.Random(0)
    words = ["hello", "he", "</", "s>", "<", "s", "<|x|>", " ", "\n", "ab"]
    for _ in range(200):
        text = "".join(draw.choice(words) for _ in range(draw.randint(1, 12)))
        if "</s>" not in text and "<s>" not in text:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_the_control_tokens_themselves_stay_what_they_are(tmp_path):
    tokenizer = saved(unigram(), tmp_path)
    assert tokenizer.piece(tokenizer.eod_id) == "</s>"
    assert tokenizer.decode([*tokenizer.encode("hello"), tokenizer.eod_id]) == "hello"
    assert tokenizer.vocabulary_size == theirs_size(unigram())


def theirs_size(tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def test_a_user_defined_symbol_of_sentencepiece_is_a_token_of_the_text_and_ends_nothing(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"some words and numbers {number}" for number in range(300)]),
        model_prefix=str(tmp_path / "v"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["</s>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "v.model")
    symbol = tokenizer.backend.piece_to_id("</s>")
    ids = tokenizer.encode("some </s> words <s>")
    assert symbol in ids
    assert not tokenizer.control_ids & {symbol, *ids}
    assert not tokenizer.text_may_hold_control_ids


def test_where_unknown_text_would_end_documents_it_is_a_bad_record(tmp_path):
    word_level(unk_token="</s>").save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer.json"
    corpus = tmp_path / "c.jsonl"
    texts = ["hello", "hello stranger", "hello hello"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["--input", str(corpus), "--tokenizer", str(path), "--workers", "1"]
    command += ["--output-prefix", str(tmp_path / "c")]
    assert preprocess(command) == 3, "a third of the records is above the limit"
    assert preprocess([*command, "--max-bad-fraction", "0.5"]) == 0
    assert check_corpus(tmp_path / "c").rejected["reasons"] == {"control token in the text": 1}
    [reject] = (tmp_path / "c.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 2
    tokens = open_tokens(tmp_path / "c", read_index(tmp_path / "c.idx"))[:]
    assert (tokens == load_tokenizer(path).eod_id).sum() == 2
