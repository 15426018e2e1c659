"""The data programs leave nothing that a power cut could empty.

How that is seen: tests/unit/test_durability.py.
"""

import pytest

from data_tools import merge, preprocess, split
from megatron_slm.testing.disk import recorded_disk_events
from tests.unit.data_tools.conftest import write_jsonl
from tests.unit.tokenizer.test_train import LINES, train


@pytest.fixture
def folder(tmp_path, corpus_file, vocabulary):
    arguments = ["--input", corpus_file, "--tokenizer", vocabulary, "--workers", "1"]
    for name in ("first", "second"):
        assert preprocess.main([*map(str, arguments), "--output-prefix", f"{tmp_path}/{name}"]) == 0
    return tmp_path


def run_preprocess(folder, vocabulary) -> int:
    arguments = ["--input", folder / "corpus.jsonl", "--tokenizer", vocabulary, "--workers", "1"]
    return preprocess.main([*map(str, arguments), "--output-prefix", f"{folder}/third"])


def run_merge(folder, vocabulary) -> int:
    inputs = [f"{folder}/first", f"{folder}/second"]
    return merge.main(["--input", *inputs, "--output-prefix", f"{folder}/merged"])


def run_split(folder, vocabulary) -> int:
    options = ["--held-out-fraction", "0.2", "--output-prefix", f"{folder}/split"]
    return split.main([f"{folder}/first", *options])


def run_tokenizer_training(folder, vocabulary) -> int:
    return train(write_jsonl(folder / "lines.jsonl", LINES), folder / "vocabulary")


@pytest.mark.parametrize("run", [run_preprocess, run_merge, run_split, run_tokenizer_training])
def test_files_are_on_disk_before_their_names_and_names_before_the_end(run, folder, vocabulary):
    with recorded_disk_events() as events:
        assert run(folder, vocabulary) == 0
    assert events.unsynced_renames == []
    assert events.unsynced_names == {}
