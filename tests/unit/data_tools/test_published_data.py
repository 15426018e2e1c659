"""Files of the schemas in which data sets are published become the tokens of their texts."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_tools.preprocess import main as preprocess
from data_tools.to_text import main as to_text
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.tokenization import load_tokenizer

QUESTION, ANSWER = "What is 2 + 2?", "It is 4.\nThe answer is: 4"
TURNS = [{"content": QUESTION, "role": "user"}, {"content": ANSWER, "role": "assistant"}]


def parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def open_web_math(folder):
    parquet(
        folder / "train-00000-of-00114-5a023365406cb9c4.parquet",
        {"url": "http://a", "text": QUESTION, "date": "2023-01-01", "metadata": "{}"},
    )
    return ["train-*.parquet"], [], [], [QUESTION]


def slim_pajama(folder):
    line = json.dumps({"text": ANSWER, "meta": {"redpajama_set_name": "RedPajamaC4"}})
    compressed = zstandard.ZstdCompressor().compress(line.encode() + b"\n")
    (folder / "train" / "chunk1").mkdir(parents=True)
    (folder / "train" / "chunk1" / "example_train_0.jsonl.zst").write_bytes(compressed)
    return ["train"], [], [], [ANSWER]


def fineweb_edu(folder):
    row = {"text": QUESTION, "id": "<urn:1>", "dump": "CC-MAIN-2024-10", "url": "http://a"}
    row |= {"file_path": "s3://a", "language": "en", "language_score": 0.9, "token_count": 8}
    (folder / "sample" / "10BT").mkdir(parents=True)
    path = folder / "sample" / "10BT" / "000_00000.parquet"
    parquet(path, row | {"score": 3.1, "int_score": 3})
    return ["sample/10BT"], [], [], [QUESTION]


def star_coder_data(folder):
    row = {"max_stars_repo_path": "a.py", "max_stars_repo_name": "b/c", "max_stars_count": 3}
    (folder / "python").mkdir()
    path = folder / "python" / "train-00000-of-00059.parquet"
    parquet(path, row | {"id": "1", "content": "x = 1\n"})
    return ["python"], [], ["--text-key", "content"], ["x = 1\n"]


def meta_math(folder):
    record = {"type": "GSM_AnsAug", "query": QUESTION, "response": ANSWER}
    record["original_question"] = QUESTION
    records = [record, record | {"query": "Naïve?"}]
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(records, indent=4))
    texts = [f"{QUESTION}\n{ANSWER}", f"Naïve?\n{ANSWER}"]
    return ["*.json"], ["--template", r"{query}\n{response}"], [], texts


def numina_math(folder):
    row = {"source": "amc", "problem": QUESTION, "solution": ANSWER, "messages": TURNS}
    parquet(folder / "train-00000-of-00005.parquet", row)
    keys = ["--text-key", "problem", "solution"]
    return ["*.parquet"], [], keys, [f"{QUESTION}\n\n{ANSWER}"]


def tulu(folder):
    parquet(folder / "train-00000-of-00006.parquet", {"id": "a", "messages": TURNS, "source": "s"})
    text = f"user: {QUESTION}\n\nassistant: {ANSWER}"
    return ["*.parquet"], ["--messages", "messages"], [], [text]


DATA_SETS = (
    open_web_math,
    slim_pajama,
    fineweb_edu,
    star_coder_data,
    meta_math,
    numina_math,
    tulu,
)


@pytest.mark.parametrize("data_set", DATA_SETS, ids=lambda data_set: data_set.__name__)
def test_a_published_data_set_becomes_the_tokens_of_its_texts(data_set, tmp_path, vocabulary):
    names, to_text_options, options, texts = data_set(tmp_path)
    inputs = [str(tmp_path / name) for name in names]
    if to_text_options:
        output = str(tmp_path / "text" / "out.jsonl")
        assert to_text(["--input", *inputs, "--output", output, *to_text_options]) == 0
        inputs = [output]
    prefix = str(tmp_path / "corpus")
    words = ["--input", *inputs, "--tokenizer", str(vocabulary), "--output-prefix", prefix]
    assert preprocess([*words, *options, "--workers", "1"]) == 0
    tokenizer = load_tokenizer(vocabulary)
    expected = []
    for text in texts:
        expected += [*tokenizer.encode(text), tokenizer.eod_id]
    assert np.array(open_tokens(prefix, read_index(f"{prefix}.idx"))[:]).tolist() == expected


def test_unusable_records_are_counted_and_too_many_publish_nothing(tmp_path, capsys):
    lines = [{"q": "a", "r": "b"}, {"q": "a"}, {"q": 3, "r": "b"}, {"q": "", "r": ""}]
    content = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n[1]\n\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    words = ["--input", str(tmp_path / "a.jsonl.gz"), "--output", str(tmp_path / "o.jsonl")]
    words += ["--template", "{q}{r}"]
    assert to_text(words) == 3
    printed = capsys.readouterr().err
    assert "5 of 6 records are unusable" in printed
    for reason in ("field that is no text: 2", "broken JSON: 1", "not a JSON object: 1"):
        assert reason in printed
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.gz"]
    assert to_text([*words, "--max-bad-fraction", "0.9"]) == 0
    assert (tmp_path / "o.jsonl").read_text() == '{"text": "ab"}\n'
    assert to_text(words) == 2  # it exists
    assert "give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, sentence",
    [
        ([], "give one of --template and --messages"),
        (["--template", "{q}", "--messages", "m"], "give one of --template and --messages"),
        (["--template", "{q}", "--turn", "{content}"], "goes with --messages only"),
        (["--template", "{q.__class__}"], "plain fields in braces"),
        (["--template", "{q!r}"], "plain fields in braces"),
        (["--template", "{q"], "template '{q'"),
        (["--template", "text"], "names no field"),
    ],
)
def test_bad_usage_is_a_sentence(options, sentence, tmp_path, capsys):
    words = ["--input", "nowhere.jsonl", "--output", str(tmp_path / "o.jsonl"), *options]
    assert to_text(words) == 2
    assert sentence in capsys.readouterr().err


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    words = ["--output", str(tmp_path / "o.jsonl"), "--template", "{q}"]
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.json").write_text('[{"q": "a"}, {"q": ')
    (tmp_path / "c.parquet").write_text("no parquet")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"q": "a"}\n')[:-6])
    for name in ("a.txt", "b.json", "c.parquet", "d.jsonl.gz", "nowhere.jsonl"):
        assert to_text(["--input", str(tmp_path / name), *words]) == 3, name
        assert name in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()
