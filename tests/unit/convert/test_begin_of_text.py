"""An exported tokenizer adds to a text what preprocessing added, and the export knows its corpora's
file.
"""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_slm.convert.begin_of_text import begins_texts, with_beginning
from megatron_slm.convert.hf_tokenizer import AWKWARD_TEXTS, write_tokenizer
from megatron_slm.tokenization import load_tokenizer

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
LINES = ["the quick brown fox jumps over a lazy dog 12 345 = x"] * 50


def post_processor(kind: str, ids: dict[str, int]):
    if kind == "plain":
        return processors.ByteLevel(trim_offsets=False)
    template = {"Llama 3's": f"{BEGIN} $A", "both ends": f"{BEGIN} $A {END}"}[kind]
    adder = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), adder])


def huggingface(folder, kind: str):
    """A byte-level BPE tokenizer.json as models are published with, whose post-processor is of this
    kind.
    """
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(LINES, trainer)
    fast.post_processor = post_processor(kind, {BEGIN: 0, END: 1})
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder / "tokenizer.json")


def sentencepiece_model(folder, kind: str):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "t.model").write_bytes(model.getvalue())
    return load_tokenizer(folder / "t.model")


SOURCES = [
    (sentencepiece_model, ""),
    (huggingface, "plain"),
    (huggingface, "Llama 3's"),
    (huggingface, "both ends"),
]


@pytest.mark.parametrize("make, kind", SOURCES)
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_transformers_begins_a_text_as_the_corpora_do(tmp_path, make, kind, prepend_bos):
    from transformers import AutoTokenizer

    tokenizer, folder = make(tmp_path / "source", kind), tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 1024, prepend_bos=prepend_bos)
    peer = AutoTokenizer.from_pretrained(folder)
    begin = [tokenizer.bos_id] if prepend_bos else []
    for text in AWKWARD_TEXTS:
        assert peer(text)["input_ids"] == begin + tokenizer.encode(text), text
    assert (peer.bos_token_id, peer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("make, kind", SOURCES)
@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_the_folder_is_known_as_the_corpora_s_tokenizer(tmp_path, make, kind, prepend_bos):
    tokenizer, folder = make(tmp_path / "source", kind), tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 128, prepend_bos=prepend_bos)
    again = load_tokenizer(folder)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eod_id) == (tokenizer.bos_id, tokenizer.eod_id)


def test_a_tokenizer_that_is_right_or_unjudged_is_copied(tmp_path):
    tokenizer = huggingface(tmp_path / "source", "Llama 3's")
    for name, prepend_bos in (("right", True), ("unjudged", None)):
        (tmp_path / name).mkdir()
        write_tokenizer(tokenizer, tmp_path / name, 128, prepend_bos=prepend_bos)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == tokenizer.path.read_bytes()
    settings = json.loads((tmp_path / "right" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "x", "what has nothing to do with ids stays"


def test_special_tokens_are_those_the_corpora_were_closed_with(tmp_path):
    """A special_tokens_map.json names them too; the export has none and must say it itself."""
    huggingface(tmp_path / "source", "plain")
    (tmp_path / "source" / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": END, "eos_token": BEGIN})
    )
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    tokenizer, folder = load_tokenizer(tmp_path / "source" / "tokenizer.json"), tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 128)
    again = load_tokenizer(folder)
    assert (again.bos_id, again.eod_id) == (tokenizer.bos_id, tokenizer.eod_id) == (1, 0)


def test_a_tokenizer_changed_after_the_export_is_not_mistaken(tmp_path):
    tokenizer, folder = sentencepiece_model(tmp_path / "source", ""), tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 128)
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content + "\n")
    with pytest.raises(ValueError, match="has changed since export_hf wrote it"):
        load_tokenizer(folder)
    assert load_tokenizer(folder / "tokenizer.json").vocabulary_size == tokenizer.vocabulary_size


def test_a_note_names_no_file_outside_its_folder(tmp_path):
    tokenizer, folder = sentencepiece_model(tmp_path / "source", ""), tmp_path / "export"
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 128)
    note = folder / "megatron_slm.json"
    note.write_text(
        json.dumps({**json.loads(note.read_text()), "tokenizer_file": "../source/t.model"})
    )
    with pytest.raises(ValueError, match="which is no file of an export"):
        load_tokenizer(folder)


def test_a_begin_token_that_does_not_exist_is_refused(tmp_path):
    tokenizer, folder = huggingface(tmp_path / "source", "plain"), tmp_path / "export"
    folder.mkdir()
    tokenizer.bos_id = None
    with pytest.raises(ValueError, match="no begin-of-text token"):
        write_tokenizer(tokenizer, folder, 128, prepend_bos=True)


def test_what_a_tokenizer_adds_is_found_out_by_running_it(tmp_path):
    for number, (kind, begins) in enumerate([("plain", False), ("Llama 3's", True)]):
        content = huggingface(tmp_path / str(number), kind).path.read_text()
        assert begins_texts(content) is begins
        assert begins_texts(with_beginning(content, (BEGIN, 0)))
