"""Arrays in files are read by position: a file that is cut short in use is named."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.file_array import UnreadableFile, open_array, open_npy
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.data.scored_dataset import open_corpora, training_dataset
from megatron_slm.scoring.corpus import TokenStream
from megatron_slm.scoring.importers import read_array
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores

ROOT = Path(__file__).resolve().parents[3]
WORD = "was cut short while it was in use"


@pytest.fixture
def corpora(tmp_path):
    """Two corpora with scores, and the folder they lie in."""
    for name in ("a", "b"):
        write_corpus(tmp_path / name, random_documents(40, 20))
        write_scores(tmp_path / f"{name}_scores", tmp_path / name)
    return tmp_path


@pytest.fixture
def blended(corpora):
    prefixes = [str(corpora / name) for name in "ab"]
    opened = open_corpora(prefixes, [f"{prefix}_scores" for prefix in prefixes])
    return training_dataset(
        opened, sequence_length=8, seed=1, samples=100, index_cache=corpora / "cache"
    )


def cut(path: Path) -> None:
    os.truncate(path, 1)


@pytest.mark.parametrize(
    "name",
    [
        "b.bin",
        "b.idx",
        "b_scores/loss.bin",
        "cache/*/*/document_index.npy",
        "cache/*/*/sample_index.npy",
        "cache/*/*/shuffle_index.npy",
        "cache/blend_*/dataset_index.npy",
        "cache/blend_*/dataset_sample_index.npy",
    ],
)
def test_a_file_cut_short_under_training_is_named(corpora, blended, name):
    blended[0]
    paths = list(corpora.glob(name))
    for path in paths:
        cut(path)
    with pytest.raises(UnreadableFile, match=WORD) as caught:
        for index in range(100):
            blended[index]
    assert any(str(path) in str(caught.value) for path in paths)


def test_a_corpus_cut_short_under_scoring_is_named(corpora):
    stream = TokenStream(str(corpora / "a"))
    cut(corpora / "a.bin")
    with pytest.raises(UnreadableFile, match=f"a.bin: the file {WORD}"):
        stream.tokens[20:30]


def test_files_cut_short_under_the_data_tools_are_named(corpora):
    index = read_index(corpora / "a.idx")
    tokens = open_tokens(corpora / "a", index)
    store = ScoreStore.open(corpora / "a_scores")
    store.read("loss", 0, 1)
    for name, read in (
        ("a.bin", lambda: tokens[:]),
        ("a.idx", index.document_starts_tokens),
        ("a_scores/loss.bin", store.verify),
    ):
        cut(corpora / name)
        with pytest.raises(UnreadableFile, match=f"{name}: the file {WORD}"):
            read()


def test_an_imported_array_cut_short_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(100, np.float32))
    array = read_array(tmp_path / "x.npy", 100)
    cut(tmp_path / "x.npy")
    with pytest.raises(UnreadableFile, match=f"x.npy: the file {WORD}"):
        array[10:20]


def test_nothing_maps_a_file():
    """A mapping that is touched after its file was cut short ends the process with SIGBUS."""
    folders = ("megatron_slm", "data_tools", "tokenizer")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for match in re.finditer(r"np\.memmap|mmap_mode|import mmap", path.read_text("utf-8"))
    ]
    assert not found, "read it through data/file_array.py"


def test_it_reads_what_the_file_holds(tmp_path):
    values = np.arange(60, dtype=np.int64).reshape(20, 3)
    np.save(tmp_path / "x.npy", values)
    array = pickle.loads(pickle.dumps(open_npy(tmp_path / "x.npy")))
    assert array.shape == (20, 3)
    assert len(array) == 20
    np.testing.assert_array_equal(array, values)
    np.testing.assert_array_equal(array[4:9], values[4:9])
    np.testing.assert_array_equal(array[15:99], values[15:])
    np.testing.assert_array_equal(array[9:4], values[9:4])
    np.testing.assert_array_equal(array[-1], values[-1])
    np.testing.assert_array_equal(array.read_pieces([(3, 5), (0, 0), (1, 2)]), values[[3, 4, 1]])
    with pytest.raises(IndexError, match="rows 19 to 21 of 20"):
        array.read_pieces([(19, 21)])
    with pytest.raises(IndexError):
        array[20]
    with pytest.raises(IndexError, match="without a step"):
        array[::2]


def test_reads_that_the_kernel_cuts_into_parts_are_put_together(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    array = open_array(tmp_path / "x", np.dtype(np.uint8))
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: whole(file, min(count, 7), at))
    assert array[3:97].tolist() == list(range(3, 97))


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(100))
    array = open_array(tmp_path / "x", np.dtype(np.uint8))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UnreadableFile, match=r"x: bytes 3 to 9 cannot be read \(Input/output"):
        array[3:9]


def test_a_file_that_is_no_array_of_numbers_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    with pytest.raises(ValueError, match="objects.npy: dtype object"):
        open_npy(tmp_path / "objects.npy")
    (tmp_path / "text.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="text.npy: not a .npy file"):
        open_npy(tmp_path / "text.npy")
    np.save(tmp_path / "short.npy", np.zeros(9))
    os.truncate(tmp_path / "short.npy", 150)
    with pytest.raises(ValueError, match="short.npy: the file is truncated: 150 bytes"):
        open_npy(tmp_path / "short.npy")
    with pytest.raises(ValueError, match="gone.npy: cannot be read"):
        open_npy(tmp_path / "gone.npy")


def test_a_damaged_cache_says_that_it_is_built_again(corpora, blended):
    path = next(corpora.glob("cache/blend_*/dataset_index.npy"))
    cut(path)
    with pytest.raises(ValueError, match=f"Delete the folder {path.parent}; it is built again"):
        training_dataset(
            open_corpora([str(corpora / name) for name in "ab"]),
            sequence_length=8,
            seed=1,
            samples=100,
            index_cache=corpora / "cache",
        )


@pytest.mark.parametrize("name", ["corpus.bin", "scores/loss.bin"])
def test_a_file_that_is_written_to_while_it_is_read_is_named(tmp_path, name):
    """Zeroes in the place of scores would train on, and nobody would know."""
    write_corpus(tmp_path / "corpus", random_documents(40, 20))
    write_scores(tmp_path / "scores", tmp_path / "corpus")
    corpora = open_corpora([str(tmp_path / "corpus")], [str(tmp_path / "scores")])
    dataset = training_dataset(corpora, sequence_length=8, seed=1, samples=10)
    assert len(dataset[0]["tokens"]) == 8
    with open(tmp_path / name, "r+b") as stream:
        stream.write(bytes(16))
    with pytest.raises(
        UnreadableFile, match=f"{name}: the file was written to while it was in use"
    ):
        dataset[1]


def test_a_file_that_is_replaced_is_read_to_the_end_as_it_was(tmp_path):
    write_corpus(tmp_path / "corpus", random_documents(40, 20))
    dataset = training_dataset(
        open_corpora([str(tmp_path / "corpus")]), sequence_length=8, seed=1, samples=10
    )
    before = dataset[3]["tokens"]
    (tmp_path / "corpus.bin").unlink()
    (tmp_path / "corpus.bin").write_bytes(b"another")
    np.testing.assert_array_equal(dataset[3]["tokens"], before)
