"""A small real vocabulary and corpus, made once for this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.preprocess import main as preprocess_main
from tokenizer.train import main as train_main

TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "The quick brown fox jumps over the lazy dog, 1234 times.",
    "  two  spaces\tand a tab\r\nand lines\n\n\nend ",
    "naïve café 日本語 🙂 x\u0301",
    "import os\nimport sys\n\nclass Thing:\n    name = 'thing'  # a comment\n",
    "</s> <s> <unk> are only text here",
]


def write_jsonl(path: Path, texts, key: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """The path of a 600-piece SentencePiece model."""
    folder = tmp_path_factory.mktemp("vocabulary")
    words = [f"value_{n} = function_{n % 7}(name, {n}) + other word number {n}" for n in range(400)]
    write_jsonl(folder / "train.jsonl", TEXTS * 10 + words)
    assert (
        train_main(
            [
                "--input",
                str(folder / "train.jsonl"),
                "--output-prefix",
                str(folder / "v"),
                "--vocab-size",
                "600",
                "--threads",
                "1",
            ]
        )
        == 0
    )
    return folder / "v.model"


@pytest.fixture
def corpus_file(tmp_path) -> Path:
    return write_jsonl(
        tmp_path / "corpus.jsonl", [f"{text} {n}" for n in range(40) for text in TEXTS]
    )


def preprocess(inputs, vocabulary, prefix, *more) -> int:
    """The exit code of data_tools.preprocess with one worker."""
    return preprocess_main(
        [
            "--input",
            *map(str, inputs),
            "--tokenizer",
            str(vocabulary),
            "--output-prefix",
            str(prefix),
            "--workers",
            "1",
            *map(str, more),
        ]
    )


@pytest.fixture
def prefix(tmp_path, vocabulary, corpus_file) -> Path:
    """The prefix of a corpus that preprocess made of `corpus_file`."""
    assert preprocess([corpus_file], vocabulary, tmp_path / "c") == 0
    return tmp_path / "c"
