"""One Tokenizer over two kinds of file."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import chain

import numpy as np
import pytest
import tokenizers

from megatron_slm.tokenization import load_tokenizer, tokenizer_differences
from megatron_slm.tokenization.token_bytes import token_bytes
from tokenizer.train import main as train

TEXTS = [
    "some words and numbers 123",
    "naïve 日本 🙂",
    "  spaces\n\tand tabs ",
    "literal <s> </s> <|endoftext|>",
]


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sp")
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"some words and numbers {n}"}) + "\n" for n in range(300))
    )
    assert (
        train(
            [
                "--input",
                str(folder / "c.jsonl"),
                "--output-prefix",
                str(folder / "v"),
                "--vocab-size",
                "320",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    return folder / "v.model"


@pytest.fixture(scope="module")
def huggingface_path(tmp_path_factory):
    """A byte-level BPE as Llama-3 and Qwen have: only tokenizer_config.json names the end token."""
    folder = tmp_path_factory.mktemp("hf")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|stop|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([f"some words and numbers {n}" for n in range(300)], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(f"{request.param}_path"))


def test_encode_decode_batch(tokenizer):
    flat, lengths = tokenizer.encode_batch(TEXTS)
    assert flat.dtype == np.uint16
    assert lengths.dtype == np.int64
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert flat.tolist() == list(chain(*ids))
    assert lengths.tolist() == list(map(len, ids))
    assert [tokenizer.decode(each) for each in ids] == TEXTS
    assert tokenizer.decode(np.array(ids[0], np.uint16)) == TEXTS[0]
    assert [len(part) for part in tokenizer.encode_batch([])] == [0, 0]
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id} - {None}
    assert special
    assert not special & set(flat.tolist())


def test_pickle_loads_again(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_pieces_join_to_the_text(tokenizer):
    text = "some words\nand more"
    assert (
        "".join(tokenizer.piece(token_id) for token_id in tokenizer.encode(text)).lstrip(" ")
        == text
    )
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.piece(tokenizer.vocabulary_size)


def test_special_ids(sentencepiece_path, huggingface_path):
    tokenizer = load_tokenizer(sentencepiece_path)
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.eod_id == tokenizer.eos_id == 2
    assert tokenizer.vocabulary_size == 320
    alone = load_tokenizer(huggingface_path)
    assert alone.kind == "huggingface"
    assert alone.eod_id == 0
    assert alone.bos_id is None
    config = huggingface_path.with_name("tokenizer_config.json")
    try:
        config.write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
        assert load_tokenizer(huggingface_path.parent).eod_id == 1
        config.write_text(json.dumps({"eos_token": "<|absent|>"}))
        with pytest.raises(ValueError, match="does not hold"):
            load_tokenizer(huggingface_path)
    finally:
        config.unlink()


def test_the_tokens_that_begin_and_end_documents_are_part_of_the_identity(
    tmp_path, huggingface_path
):
    """Two folders with one tokenizer.json; one names another end in tokenizer_config.json."""
    for name, settings in (("ours", {}), ("theirs", {"eos_token": "<|stop|>"})):
        (tmp_path / name).mkdir()
        shutil.copy(huggingface_path, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = (load_tokenizer(tmp_path / name).entry for name in ("ours", "theirs"))
    assert ours["fingerprint"] == theirs["fingerprint"]
    assert tokenizer_differences(ours, theirs) == ["eod_id 0 and 1"]
    assert tokenizer_differences(ours, {**ours, "path": "moved", "bos_id": 7}) == [
        "bos_id None and 7"
    ]
    of_an_earlier_version = {name: value for name, value in ours.items() if name != "bos_id"}
    assert tokenizer_differences(ours, of_an_earlier_version) == []


def test_saved_truncation_is_not_applied(tmp_path, huggingface_path):
    backend = tokenizers.Tokenizer.from_file(str(huggingface_path))
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert (
        len(load_tokenizer(tmp_path / "tokenizer.json").encode("some words and numbers 1 2 3")) > 3
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.model", b""),
        ("x.model", b"\0" * 100),
        ("x.model", b"not a model"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b""),
    ],
)
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path / name)


def test_missing_or_empty_places(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match="neither"):
        load_tokenizer(tmp_path)


def test_no_token_to_end_documents(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="end-of-sequence"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "metaspace"])
def test_the_bytes_of_a_documents_tokens_are_those_of_its_text(kind, request, tmp_path):
    """Without the first token, which may begin with a space that is in no text."""
    if kind == "metaspace":
        path = tmp_path / "tokenizer.json"
        metaspace_vocabulary().save(str(path))
    else:
        path = request.getfixturevalue(f"{kind}_path")
    tokenizer = load_tokenizer(path)
    sizes = token_bytes(tokenizer)
    assert len(sizes) == tokenizer.vocabulary_size
    assert sizes[tokenizer.eod_id] == 0
    for text in ["some words and numbers 123", "some naïve 日本 🙂 words", "words\n\tand  tabs "]:
        ids = tokenizer.encode(text)
        after_first = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
        assert sizes[ids[1:]].sum() == after_first, text


def metaspace_vocabulary():
    """A byte-pair vocabulary as Llama-2's tokenizer.json: spaces as ▁, other bytes as <0xNN>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"someward numbit123\t"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def test_the_unknown_token_has_no_known_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "word": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(load_tokenizer(tmp_path / "tokenizer.json")).tolist() == [-1, 0, 5]
