"""The corpus is what megatron-core's own builder writes.

Whatever the format of the input or the number of workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.verify import main as verify
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus
from megatron_slm.tokenization import load_tokenizer
from tests.unit.data_tools.conftest import preprocess

ROOT = Path(__file__).resolve().parents[3]


def built_by_megatron(texts, vocabulary, prefix, append_eod=True):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(vocabulary)
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocabulary_size)
    )
    for text in texts:
        ids = tokenizer.encode(text) + ([tokenizer.eod_id] if append_eod else [])
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_equal_megatron_core(tmp_path, corpus_file, vocabulary, append_eod):
    option = "--append-eod" if append_eod else "--no-append-eod"
    assert preprocess([corpus_file], vocabulary, tmp_path / "ours", option) == 0
    built_by_megatron(texts_of(corpus_file), vocabulary, tmp_path / "theirs", append_eod)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()
    manifest = check_corpus(tmp_path / "ours")
    assert manifest.documents == 240
    assert manifest.append_eod is append_eod


def test_megatron_core_opens_it(tmp_path, corpus_file, vocabulary):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 0
    dataset = IndexedDataset(str(tmp_path / "c"))
    tokenizer = load_tokenizer(vocabulary)
    assert tokenizer.decode(dataset[3][:-1]) == texts_of(corpus_file)[3]
    assert all(document[-1] == tokenizer.eod_id for document in dataset[:])


def test_workers_do_not_change_the_result(tmp_path, vocabulary, corpus_file):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(f"file {number}\n" * (number + 1))
    assert preprocess([corpus_file, folder], vocabulary, tmp_path / "one") == 0
    assert preprocess([corpus_file, folder], vocabulary, tmp_path / "three", "--workers", "3") == 0
    for suffix in (".bin", ".idx", ".manifest.json", ".statistics.json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (
            tmp_path / f"three{suffix}"
        ).read_bytes()
    index = read_index(tmp_path / "one.idx")
    tokens = open_tokens(tmp_path / "one", index)
    starts = index.document_starts_tokens()
    assert index.documents == 270
    assert load_tokenizer(vocabulary).decode(tokens[starts[-2] : -1]) == "file 29\n" * 30
    sources = CorpusManifest.read(tmp_path / "one").sources
    assert [source["documents"] for source in sources] == [240, 30]


def test_refuses_to_overwrite(tmp_path, corpus_file, vocabulary, capsys):
    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 0
    before = (tmp_path / "c.bin").read_bytes()
    assert preprocess([corpus_file], vocabulary, tmp_path / "c", "--no-append-eod") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "c.bin").read_bytes() == before
    assert preprocess([corpus_file], vocabulary, tmp_path / "c", "--skip-complete") == 0
    assert (
        preprocess([corpus_file], vocabulary, tmp_path / "c", "--overwrite", "--no-append-eod") == 0
    )
    assert len((tmp_path / "c.bin").read_bytes()) == len(before) - 2 * 240
    check_corpus(tmp_path / "c")
    assert not (tmp_path / "c.partial").exists()


def test_a_second_run_of_the_same_command_does_nothing(tmp_path, corpus_file, vocabulary, capsys):
    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 0
    stamp = (tmp_path / "c.bin").stat().st_mtime_ns
    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 0
    assert "done before, from the same inputs and options" in capsys.readouterr().out
    assert (tmp_path / "c.bin").stat().st_mtime_ns == stamp


def test_a_second_run_from_other_text_or_options_is_refused_by_name(
    tmp_path, corpus_file, vocabulary, capsys
):
    text = tmp_path / "text.jsonl"
    text.write_bytes(Path(corpus_file).read_bytes())
    assert preprocess([text], vocabulary, tmp_path / "c") == 0
    assert preprocess([text], vocabulary, tmp_path / "c", "--max-bad-fraction", "0") == 2
    assert "max_bad_fraction: it has 0.05, this command has 0.0" in capsys.readouterr().err
    text.write_bytes(text.read_bytes() * 2)
    assert preprocess([text], vocabulary, tmp_path / "c") == 3
    assert "files: it has" in capsys.readouterr().err


def test_a_finished_corpus_that_was_damaged_is_not_done(tmp_path, corpus_file, vocabulary, capsys):
    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 0
    tokens = bytearray((tmp_path / "c.bin").read_bytes())
    tokens[0] ^= 1
    (tmp_path / "c.bin").write_bytes(tokens)
    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 3
    assert "content has changed" in capsys.readouterr().err


def test_all_wrong_options_at_once(tmp_path, corpus_file, vocabulary, capsys):
    assert (
        preprocess(
            [corpus_file],
            vocabulary,
            tmp_path / "c",
            "--workers",
            "0",
            "--max-bad-fraction",
            "2",
            "--keep-if",
            "nowhere.py:f",
        )
        == 2
    )
    message = capsys.readouterr().err
    assert "--workers 0" in message
    assert "--max-bad-fraction 2" in message
    assert "nowhere.py" in message
    assert preprocess([tmp_path / "missing.jsonl"], vocabulary, tmp_path / "c") == 3
    assert preprocess([corpus_file], tmp_path / "missing.model", tmp_path / "c") == 3


def test_uint16_ends_at_65499(tmp_path):
    from megatron.core.datasets.indexed_dataset import DType

    from megatron_slm.tokenization import token_dtype

    for size in (4096, 65_499, 65_500, 65_535, 65_536, 65_537, 151_936):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


@pytest.mark.parametrize("size, dtype", [(65_499, "uint16"), (65_500, "int32"), (65_536, "int32")])
def test_huggingface_vocabularies_around_16_bits(tmp_path, size, dtype):
    """The dtype is megatron-core's, the largest id survives, the tokens are the tokenizer's."""
    import tokenizers
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|endoftext|>": 0} | {f"w{n}": n for n in range(1, size)})
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "c.jsonl"
    path.write_text(
        json.dumps({"text": f"w1 w{size - 1} w7"}) + "\n" + json.dumps({"text": "w2"}) + "\n"
    )
    assert preprocess([path], tmp_path / "tokenizer.json", tmp_path / "c") == 0
    dataset = IndexedDataset(str(tmp_path / "c"))
    assert [document.tolist() for document in dataset[:]] == [[1, size - 1, 7, 0], [2, 0]]
    assert CorpusManifest.read(tmp_path / "c").token_dtype == dtype
    assert verify([str(tmp_path / "c")]) == 0


@pytest.mark.parametrize(
    "model, reason", [("WordLevel", "the tokenizer failed"), ("BPE", "no tokens")]
)
def test_text_the_tokenizer_makes_nothing_of(tmp_path, model, reason):
    import tokenizers

    vocabulary = {"</s>": 0, "w": 1}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [])
        if model == "BPE"
        else tokenizers.models.WordLevel(vocabulary)
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "w"}\n{"text": "unheard"}\n{"text": "w"}\n')
    assert (
        preprocess([path], tmp_path / "tokenizer.json", tmp_path / "c", "--max-bad-fraction", "1")
        == 0
    )
    manifest = CorpusManifest.read(tmp_path / "c")
    assert manifest.rejected["reasons"] == {reason: 1}
    assert manifest.documents == 2
    assert json.loads((tmp_path / "c.rejects.jsonl").read_text())["line"] == 2


def test_prepend_bos(tmp_path, corpus_file, vocabulary):
    assert preprocess([corpus_file], vocabulary, tmp_path / "c", "--prepend-bos") == 0
    index = read_index(tmp_path / "c.idx")
    tokens = open_tokens(tmp_path / "c", index)[:]
    tokenizer = load_tokenizer(vocabulary)
    assert (tokens[index.document_starts_tokens()[:-1]] == tokenizer.bos_id).all()
    assert check_corpus(tmp_path / "c").prepend_bos


def test_memory_does_not_grow_with_the_input(tmp_path, vocabulary):
    """Peak memory of the process on 20 times the input, in blocks of 256 kB."""
    launch = (
        "import resource, sys, data_tools.reading.inputs\n"
        "data_tools.reading.inputs.plan_units.__defaults__ = (1 << 18,)\n"
        "from data_tools.preprocess import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    text = "".join(
        json.dumps({"text": f"document {n} " + "of some length " * (n % 90)}) + "\n"
        for n in range(1000)
    )
    peaks_kb = []
    for copies in (1, 20):
        (tmp_path / f"{copies}.jsonl").write_text(text * copies)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                launch,
                "--input",
                str(tmp_path / f"{copies}.jsonl"),
                "--tokenizer",
                str(vocabulary),
                "--output-prefix",
                str(tmp_path / f"c{copies}"),
                "--workers",
                "1",
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        peaks_kb.append(int(done.stdout.split("peak ")[1]))
    assert peaks_kb[1] < peaks_kb[0] * 1.1 + 4000, peaks_kb
